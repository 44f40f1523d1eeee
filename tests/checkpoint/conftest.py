"""An independent writer and reader of the released formats, in NumPy alone.

Nothing here calls the package: names, orientation and order of rows are written down a
second time, so that a slip in the key table cannot hide.
"""

import json
import types

import ml_dtypes
import numpy as np
import pytest

BF16 = np.dtype(ml_dtypes.bfloat16)
TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
DTYPES = {"F32": np.float32, "BF16": BF16, "F16": np.float16}

VOCAB, D_MODEL, HEADS, KV_HEADS, HEAD_DIM, D_FF, LAYERS = 40, 24, 4, 2, 8, 28, 4
D_INNER, D_XB, DT_RANK, D_CONV, D_STATE = 32, 16, 2, 4, 16
ATTENTION_LAYERS = (1, 3)


def write_safetensors(path, tensors):
    """Writes the format by hand: header length, JSON header, bytes."""
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, value in tensors.items():
        blob = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": TAGS[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def read_safetensors(folder):
    """Reads all tensors of a folder, single or sharded, without the library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            value = np.frombuffer(
                data[start + first : start + last], DTYPES[entry["dtype"]]
            )
            assert name not in tensors
            tensors[name] = value.reshape(entry["shape"])
    return tensors


def llama_json(**changes):
    """Returns a config.json as transformers 4 writes it."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {k: v for k, v in (values | changes).items() if v != "absent"}


def mamba_json(kind, **changes):
    """Returns a mamba_config.json as the hybrids' training scripts write it."""
    ssm_cfg = {"expand": 1}
    if kind == "mamba2":
        ssm_cfg |= {"ngroups": HEADS, "d_state": HEAD_DIM}
    values = {
        "d_model": D_MODEL,
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": 1e-5,
        "vocab_size": None,
        "d_inner": D_INNER,
        "d_xb": D_XB,
        "intermediate_size": D_FF,
        "hidden_act": "silu",
        "n_layer": LAYERS,
        "attn_layers": list(ATTENTION_LAYERS),
    }
    return {k: v for k, v in (values | changes).items() if v != "absent"}


def layer_shapes(i, kind):
    """Returns the tensors of one decoder layer, as PyTorch shapes them."""
    shapes = {
        "input_layernorm.weight": (D_MODEL,),
        "post_attention_layernorm.weight": (D_MODEL,),
        "mlp.gate_proj.weight": (D_FF, D_MODEL),
        "mlp.up_proj.weight": (D_FF, D_MODEL),
        "mlp.down_proj.weight": (D_MODEL, D_FF),
    }
    if kind == "attention":
        shapes |= {
            "self_attn.q_proj.weight": (HEADS * HEAD_DIM, D_MODEL),
            "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, D_MODEL),
            "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, D_MODEL),
            "self_attn.o_proj.weight": (D_MODEL, HEADS * HEAD_DIM),
        }
    elif kind == "mamba":
        shapes |= {
            "mamba.in_proj_x.weight": (D_XB, D_MODEL),
            "mamba.in_proj_z.weight": (D_INNER, D_MODEL),
            "mamba.B_proj.weight": (D_XB, D_MODEL),
            "mamba.C_proj.weight": (D_INNER, D_MODEL),
            "mamba.dt_proj_down.weight": (DT_RANK, D_MODEL),
            "mamba.dt_proj.weight": (D_INNER, DT_RANK),
            "mamba.dt_proj.bias": (D_INNER,),
            "mamba.conv1d.weight": (D_INNER, 1, D_CONV),
            "mamba.conv1d.bias": (D_INNER,),
            "mamba.A_log": (D_INNER, D_STATE),
            "mamba.D": (D_INNER,),
            "mamba.out_proj.weight": (D_MODEL, D_INNER),
        }
    else:
        shapes |= {
            "mamba.in_proj.weight": (2 * D_INNER + 2 * D_XB + HEADS, D_MODEL),
            "mamba.conv1d.weight": (2 * D_XB + D_INNER, 1, D_CONV),
            "mamba.conv1d.bias": (2 * D_XB + D_INNER,),
            "mamba.A_log": (HEADS,),
            "mamba.D": (HEADS,),
            "mamba.dt_bias": (HEADS,),
            "mamba.norm.weight": (D_INNER,),
            "mamba.out_proj.weight": (D_MODEL, D_INNER),
        }
    return {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}


def file_tensors(kind="attention", dtype="float32", seed=0):
    """Returns random tensors under their released names; `kind` is Mamba's."""
    shapes = {"model.embed_tokens.weight": (VOCAB, D_MODEL)}
    for i in range(LAYERS):
        shapes |= layer_shapes(i, "attention" if i in ATTENTION_LAYERS else kind)
    shapes |= {"model.norm.weight": (D_MODEL,), "lm_head.weight": (VOCAB, D_MODEL)}
    rng = np.random.default_rng(seed)
    dtype = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    return {k: rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}


def write_folder(folder, *, kind="attention", tensors=None, config=None, mamba=None):
    """Writes a checkpoint folder in the released layout and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = file_tensors(kind) if tensors is None else tensors
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config or llama_json()))
    if kind != "attention":
        mamba = mamba or mamba_json(kind)
        (folder / "mamba_config.json").write_text(json.dumps(mamba))
    return folder


def write_shards(folder, shards, weight_map=None):
    """Writes shards and their index; `weight_map` overrides the true one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(llama_json()))
    true_map = {}
    for i, tensors in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, tensors)
        true_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map or true_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same_bits(actual, expected):
    """Checks names, dtypes, shapes and every bit, NaN payloads too."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        other = np.asarray(actual[name])
        assert other.dtype == value.dtype, name
        assert other.shape == value.shape, name
        assert other.tobytes() == np.asarray(value).tobytes(), name


@pytest.fixture(scope="session")
def released():
    """The independent writer and reader."""
    return types.SimpleNamespace(**globals())
