"""Hybrids in the released format, written here, against the formulas.

Key names, orientation, the halved dt bias and Mamba-2's order of rows are spelled out, so
that the importer's table meets an independent one.
"""

import json
import pathlib
import tempfile

import numpy as np
from safetensors.numpy import save_file

from mil_jax.checkpoint import hf_import
from mil_jax.config import ModelConfig, SSMConfig

from . import oracle, tiny
from .compare import assert_close

V, D, H, K, P, F = 40, 32, 4, 2, 32, 24
E, X, R, W = H * P, K * P, 2, 4
KINDS = ("mamba", "attention", "mamba")


def torch_tensors(kind):
    """Returns a checkpoint: names and [out, in] shapes as published."""
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i, layer in enumerate(KINDS):
        for name, shape in _layer_shapes(layer, kind).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    rng = np.random.default_rng(0)
    return {n: _draw(n, s, rng).astype(np.float32) for n, s in shapes.items()}


def _layer_shapes(layer, kind):
    shapes = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    if layer == "attention":
        return shapes | {
            "self_attn.q_proj.weight": (H * P, D),
            "self_attn.k_proj.weight": (K * P, D),
            "self_attn.v_proj.weight": (K * P, D),
            "self_attn.o_proj.weight": (D, H * P),
        }
    shapes["mamba.out_proj.weight"] = (D, E)
    if kind == "mamba":
        return shapes | {
            "mamba.in_proj_x.weight": (X, D),
            "mamba.in_proj_z.weight": (E, D),
            "mamba.B_proj.weight": (X, D),
            "mamba.C_proj.weight": (E, D),
            "mamba.dt_proj_down.weight": (R, D),
            "mamba.dt_proj.weight": (E, R),
            "mamba.dt_proj.bias": (E,),
            "mamba.conv1d.weight": (E, 1, W),
            "mamba.conv1d.bias": (E,),
            "mamba.A_log": (E, 16),
            "mamba.D": (E,),
        }
    return shapes | {
        "mamba.in_proj.weight": (2 * E + 2 * X + H, D),
        "mamba.conv1d.weight": (2 * X + E, 1, W),
        "mamba.conv1d.bias": (2 * X + E,),
        "mamba.A_log": (H,),
        "mamba.D": (H,),
        "mamba.dt_bias": (H,),
        "mamba.norm.weight": (E,),
    }


def _draw(name, shape, rng):
    normal = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * normal
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.2, 3.0, shape))
    if name.endswith(("dt_proj.bias", "dt_bias")):
        return 0.5 * normal - 0.5
    if len(shape) == 2:
        return normal / np.sqrt(shape[1])
    return 0.5 * normal


def write(folder, kind):
    """Writes the folder as published and returns its tensors."""
    tensors = torch_tensors(kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": len(KINDS),
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": P,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-2,
        "rope_theta": 200.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    ssm_cfg = {"expand": 1}
    if kind == "mamba2":
        ssm_cfg |= {"ngroups": H, "d_state": P}
    mamba = {
        "d_model": D,
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": 1e-2,
        "vocab_size": None,
        "d_inner": E,
        "d_xb": X,
        "intermediate_size": F,
        "hidden_act": "silu",
        "n_layer": len(KINDS),
        "attn_layers": [i for i, k in enumerate(KINDS) if k == "attention"],
    }
    (folder / "mamba_config.json").write_text(json.dumps(mamba))
    return tensors


def formula(tensors, kind):
    """Returns the oracle of published tensors."""
    params = {
        "embed.embedding": tensors["model.embed_tokens.weight"],
        "final_norm.scale": tensors["model.norm.weight"],
        "lm_head.kernel": tensors["lm_head.weight"].T,
    }
    for i, layer in enumerate(KINDS):
        prefix = f"model.layers.{i}."
        t = {k.removeprefix(prefix): v for k, v in tensors.items() if prefix in k}
        for name, value in _layer_params(t, layer, kind).items():
            params[f"layers.{i}.{name}"] = value
    is_mamba = kind == "mamba"
    config = ModelConfig(
        vocab_size=V,
        d_model=D,
        layer_types=tuple(kind if k == "mamba" else k for k in KINDS),
        n_heads=H,
        n_kv_heads=K,
        head_dim=P,
        d_ff=F,
        rms_norm_eps=1e-2,
        rope_theta=200.0,
        ssm=SSMConfig(d_state=16 if is_mamba else P, dt_rank=R, d_inner=E, d_xb=X),
    )
    return oracle.Model(config, params)


def _layer_params(t, layer, kind):
    params = {
        "input_norm.scale": t["input_layernorm.weight"],
        "mlp_norm.scale": t["post_attention_layernorm.weight"],
    }
    for name in ("gate_proj", "up_proj", "down_proj"):
        params[f"mlp.{name}.kernel"] = t[f"mlp.{name}.weight"].T
    if layer == "attention":
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            params[f"attn.{name}.kernel"] = t[f"self_attn.{name}.weight"].T
        return params
    params |= {
        f"{kind}.out_proj.kernel": t["mamba.out_proj.weight"].T,
        f"{kind}.conv_kernel": t["mamba.conv1d.weight"][:, 0].T,
        f"{kind}.conv_bias": t["mamba.conv1d.bias"],
        f"{kind}.A_log": t["mamba.A_log"],
        f"{kind}.D": t["mamba.D"],
    }
    if kind == "mamba":
        return params | {
            "mamba.x_proj.kernel": t["mamba.in_proj_x.weight"].T,
            "mamba.z_proj.kernel": t["mamba.in_proj_z.weight"].T,
            "mamba.B_proj.kernel": t["mamba.B_proj.weight"].T,
            "mamba.C_proj.kernel": t["mamba.C_proj.weight"].T,
            "mamba.dt_down.kernel": t["mamba.dt_proj_down.weight"].T,
            "mamba.dt_up.kernel": t["mamba.dt_proj.weight"].T,
            # Published models add it twice.
            "mamba.dt_bias": 2 * t["mamba.dt_proj.bias"],
        }
    rows = t["mamba.in_proj.weight"]
    z, x, B, C, dt = np.split(rows, [E, E + X, E + 2 * X, 2 * E + 2 * X])
    assert dt.shape == (H, D)
    return params | {
        "mamba2.z_proj.kernel": z.T,
        "mamba2.x_proj.kernel": x.T,
        "mamba2.B_proj.kernel": B.T,
        "mamba2.C_proj.kernel": C.T,
        "mamba2.dt_proj.kernel": dt.T,
        "mamba2.dt_bias": t["mamba.dt_bias"],
        "mamba2.norm.scale": t["mamba.norm.weight"],
    }


def check_released(kind):
    """The model of a published folder computes the formulas on its tensors."""
    with tempfile.TemporaryDirectory() as name:
        tensors = write(pathlib.Path(name), kind)
        checkpoint = hf_import.load(name)
        model = tiny.build(checkpoint.config, checkpoint.params)
    tokens = np.random.default_rng(1).integers(0, V, (2, 21)).astype(np.int32)
    reference = formula(tensors, kind)
    assert_close(tiny.forward(model, tokens), [reference(row) for row in tokens])
