"""Parity with torch and transformers: every weight's bits, and loading our export."""

import json
import os

import numpy as np
import pytest

from mil_jax.checkpoint import hf_export, hf_import
from mil_jax.config import RopeScaling
from mil_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama_gqa": (transformers.LlamaConfig, {"rms_norm_eps": 1e-5, "pad_token_id": 0}),
    "llama_tied": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "eos_token_id": [2, 3]},
    ),
    "llama_3_1": (
        transformers.LlamaConfig,
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ),
    "mistral_window": (transformers.MistralConfig, {"sliding_window": 4}),
    "mistral_full": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (
        transformers.Qwen2Config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2_window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "qwen3": (transformers.Qwen3Config, {}),
}


def make_model(name, dtype=torch.float32):
    cls, changes = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**SIZES, **changes))
    randomize(model)
    return model.to(dtype).eval()


def randomize(model):
    """Replaces every weight, so that norms of one and biases of zero hide nothing."""
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.3)


def to_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def expected_params(model):
    """Returns our names and orientations, spelled out from the torch module tree."""
    expected = {}

    def linear(name, module):
        expected[f"{name}.kernel"] = module.weight.detach().T
        if module.bias is not None:
            expected[f"{name}.bias"] = module.bias.detach()

    expected["embed.embedding"] = model.model.embed_tokens.weight.detach()
    expected["final_norm.scale"] = model.model.norm.weight.detach()
    if not model.config.tie_word_embeddings:
        linear("lm_head", model.lm_head)
    for i, layer in enumerate(model.model.layers):
        ours = f"layers.{i}"
        expected[f"{ours}.input_norm.scale"] = layer.input_layernorm.weight.detach()
        norm = layer.post_attention_layernorm.weight.detach()
        expected[f"{ours}.mlp_norm.scale"] = norm
        for p in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(f"{ours}.attn.{p}", getattr(layer.self_attn, p))
        for p in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, p):
                norm = getattr(layer.self_attn, p).weight.detach()
                expected[f"{ours}.attn.{p}.scale"] = norm
        for p in ("gate_proj", "up_proj", "down_proj"):
            linear(f"{ours}.mlp.{p}", getattr(layer.mlp, p))
    return {name: to_numpy(value.contiguous()) for name, value in expected.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_import_and_export(tmp_path, released, name, dtype):
    model = make_model(name, getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf")
    checkpoint = hf_import.load(tmp_path / "hf")
    released.assert_same_bits(checkpoint.params, expected_params(model))

    hf_export.save(tmp_path / "ours", checkpoint.config, checkpoint.params)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert loaded.dtype == model.dtype
    theirs, ours = model.state_dict(), loaded.state_dict()
    released.assert_same_bits(
        {k: to_numpy(v) for k, v in ours.items()},
        {k: to_numpy(v) for k, v in theirs.items()},
    )
    # Same weights and the same function, so the exported config says the same. The
    # positions go beyond the window and the original length of the scaled RoPE.
    tokens = torch.arange(48)[None] % SIZES["vocab_size"]
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected, actual = original(tokens).logits, loaded(tokens).logits
    assert torch.isfinite(expected).all()
    assert expected.std() > 0.01
    assert torch.equal(actual, expected)
    for key in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",
    ):
        assert getattr(loaded.config, key) == getattr(model.config, key), key


def test_configs(tmp_path):
    expected = {
        "llama_gqa": {"rms_norm_eps": 1e-5, "n_kv_heads": 2, "pad_token_id": 0},
        "llama_tied": {"tie_embeddings": True, "eos_token_ids": (2, 3)},
        "llama_3_1": {
            "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32),
            "rope_theta": 5e5,
        },
        "mistral_window": {"sliding_window": 4, "model_type": "mistral"},
        "mistral_full": {"sliding_window": None},
        "qwen2": {"attention_bias": True, "rope_theta": 1e6, "sliding_window": None},
        "qwen2_window": {"sliding_window": 4},
        "qwen3": {"qk_norm": True, "head_dim": 8},
    }
    assert set(expected) == set(MODELS)
    for name, fields in expected.items():
        make_model(name).save_pretrained(tmp_path / name)
        config = hf_import.load(tmp_path / name).config
        for field, value in fields.items():
            assert getattr(config, field) == value, (name, field)


def test_tied_and_written_out(tmp_path, released):
    model = make_model("llama_tied")
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    assert "lm_head.weight" in model.state_dict()
    params = hf_import.load(tmp_path / "m").params
    released.assert_same_bits(params, expected_params(model))


def test_sharded_safetensors(tmp_path, released):
    model = make_model("llama_gqa")
    model.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    params = hf_import.load(tmp_path / "m").params
    released.assert_same_bits(params, expected_params(model))


def write_torch_folder(folder, model, shards=1, **kwargs):
    folder.mkdir()
    model.config.save_pretrained(folder)
    items = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(items), folder / "pytorch_model.bin", **kwargs)
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(dict(items[i::shards]), folder / name, **kwargs)
        weight_map |= {key: name for key, _ in items[i::shards]}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, released, dtype, shards, zipped):
    model = make_model("qwen3", getattr(torch, dtype))
    folder = write_torch_folder(
        tmp_path / "m", model, shards, _use_new_zipfile_serialization=zipped
    )
    params = hf_import.load(folder).params
    released.assert_same_bits(params, expected_params(model))


def test_torch_tensor_that_is_a_view(tmp_path, released):
    model = make_model("llama_gqa")
    folder = write_torch_folder(tmp_path / "m", model)
    tensors = {k: v.t().contiguous().t() for k, v in model.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    released.assert_same_bits(hf_import.load(folder).params, expected_params(model))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 10, -200])
def test_damaged_torch_file(tmp_path, zipped, keep):
    folder = write_torch_folder(
        tmp_path / "m", make_model("llama_gqa"), _use_new_zipfile_serialization=zipped
    )
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"pytorch_model\.bin .*download or export"):
        hf_import.load(folder)


class Trap:
    """Unpickles by making a folder, as a hostile file could run anything."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_torch_file_cannot_run_code(tmp_path):
    folder = write_torch_folder(tmp_path / "m", make_model("llama_gqa"))
    torch.save({"a": Trap(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        hf_import.load(folder)
    assert not (tmp_path / "ran").exists()


def test_torch_tensor_of_wrong_dtype(tmp_path):
    model = make_model("llama_gqa")
    folder = write_torch_folder(tmp_path / "m", model.double())
    with pytest.raises(UserError, match="embed_tokens.*float64"):
        hf_import.load(folder)


def test_pure_mamba_in_both_forms(tmp_path, released):
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, state_size=16
    )
    model = transformers.MambaForCausalLM(config)
    randomize(model)
    model.save_pretrained(tmp_path / "hf")
    checkpoint = hf_import.load(tmp_path / "hf")
    state = {k: to_numpy(v) for k, v in model.state_dict().items()}
    mixer = "backbone.layers.1.mixer."
    expected = {
        "x_proj.kernel": state[mixer + "in_proj.weight"][:48].T,
        "z_proj.kernel": state[mixer + "in_proj.weight"][48:].T,
        "dt_down.kernel": state[mixer + "x_proj.weight"][:2].T,
        "B_proj.kernel": state[mixer + "x_proj.weight"][2:18].T,
        "C_proj.kernel": state[mixer + "x_proj.weight"][18:].T,
        "dt_up.kernel": state[mixer + "dt_proj.weight"].T,
        "dt_bias": state[mixer + "dt_proj.bias"],
        "conv_kernel": state[mixer + "conv1d.weight"][:, 0].T,
        "conv_bias": state[mixer + "conv1d.bias"],
        "A_log": state[mixer + "A_log"],
        "D": state[mixer + "D"],
        "out_proj.kernel": state[mixer + "out_proj.weight"].T,
    }
    prefix = "layers.1.mamba."
    released.assert_same_bits(
        {k: v for k, v in checkpoint.params.items() if k.startswith(prefix)},
        {prefix + k: v for k, v in expected.items()},
    )
    equal = np.testing.assert_array_equal
    equal(checkpoint.params["embed.embedding"], state["backbone.embeddings.weight"])

    original = {
        k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()
    }
    (tmp_path / "original").mkdir()
    torch.save(original, tmp_path / "original" / "pytorch_model.bin")
    values = {
        "d_model": 24,
        "n_layer": 2,
        "vocab_size": 37,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (tmp_path / "original" / "config.json").write_text(json.dumps(values))
    again = hf_import.load(tmp_path / "original")
    released.assert_same_bits(again.params, checkpoint.params)
    assert again.config.ssm == checkpoint.config.ssm
    assert again.config.vocab_size == checkpoint.config.vocab_size == 40


def test_hybrid_attention_layers_match_the_teacher(tmp_path, released):
    # A hybrid's config.json is its teacher's: what transformers writes must do.
    model = make_model("mistral_window")
    model.save_pretrained(tmp_path / "m")
    tensors = {k: to_numpy(v) for k, v in model.state_dict().items()}
    donor = released.file_tensors("mamba")
    for i in (0, 2):
        gone = f"model.layers.{i}.self_attn."
        tensors = {k: v for k, v in tensors.items() if not k.startswith(gone)}
        mixer = f"model.layers.{i}.mamba."
        tensors |= {k: v for k, v in donor.items() if k.startswith(mixer)}
    released.write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    mamba = released.mamba_json("mamba", n_layer=3, attn_layers=[1], rms_norm_eps=1e-6)
    (tmp_path / "m" / "mamba_config.json").write_text(json.dumps(mamba))
    checkpoint = hf_import.load(tmp_path / "m")
    assert checkpoint.config.sliding_window == 4
    assert checkpoint.config.layer_types == ("mamba", "attention", "mamba")
    expected = expected_params(model)
    kept = {
        k: v for k, v in expected.items() if ".0.attn." not in k and ".2.attn." not in k
    }
    ours = {k: v for k, v in checkpoint.params.items() if ".mamba." not in k}
    released.assert_same_bits(ours, kept)
