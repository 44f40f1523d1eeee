"""Import: names, orientation, configs, errors, memory, against hand-written files."""

import json
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from mil_jax.checkpoint import hf_import
from mil_jax.config import RopeScaling, SSMConfig
from mil_jax.errors import UserError

KINDS = ("attention", "mamba", "mamba2")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


def equal(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), expected, strict=True)


def fails(path, *words, **kwargs):
    """Checks that loading fails with one line that has all the words."""
    with pytest.raises(UserError) as caught:
        hf_import.load(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_attention_layer_is_transposed_and_renamed(tmp_path, released):
    tensors = released.file_tensors()
    checkpoint = hf_import.load(released.write_folder(tmp_path / "m", tensors=tensors))
    params = checkpoint.params
    assert checkpoint.source == tmp_path / "m"
    equal(params["embed.embedding"], tensors["model.embed_tokens.weight"])
    equal(params["final_norm.scale"], tensors["model.norm.weight"])
    equal(params["lm_head.kernel"], tensors["lm_head.weight"].T)
    layer = "model.layers.2."
    equal(
        params["layers.2.input_norm.scale"], tensors[layer + "input_layernorm.weight"]
    )
    equal(
        params["layers.2.mlp_norm.scale"],
        tensors[layer + "post_attention_layernorm.weight"],
    )
    for p in ("q_proj", "k_proj", "v_proj", "o_proj"):
        equal(
            params[f"layers.2.attn.{p}.kernel"],
            tensors[f"{layer}self_attn.{p}.weight"].T,
        )
    for p in ("gate_proj", "up_proj", "down_proj"):
        equal(params[f"layers.2.mlp.{p}.kernel"], tensors[f"{layer}mlp.{p}.weight"].T)
    assert len(params) == 3 + released.LAYERS * 9


def test_mamba_layer(tmp_path, released):
    tensors = released.file_tensors("mamba")
    folder = released.write_folder(tmp_path / "m", kind="mamba", tensors=tensors)
    checkpoint = hf_import.load(folder)
    for i in range(released.LAYERS):
        kind = "attention" if i in (1, 3) else "mamba"
        assert checkpoint.config.layer_types[i] == kind
    assert checkpoint.config.ssm == SSMConfig(
        d_state=16, dt_rank=2, d_inner=32, d_xb=16
    )
    ours = {
        name.removeprefix("layers.2.mamba."): value
        for name, value in checkpoint.params.items()
        if name.startswith("layers.2.mamba.")
    }
    theirs = {
        name.removeprefix("model.layers.2.mamba."): value
        for name, value in tensors.items()
        if name.startswith("model.layers.2.mamba.")
    }
    equal(ours.pop("x_proj.kernel"), theirs["in_proj_x.weight"].T)
    equal(ours.pop("z_proj.kernel"), theirs["in_proj_z.weight"].T)
    equal(ours.pop("B_proj.kernel"), theirs["B_proj.weight"].T)
    equal(ours.pop("C_proj.kernel"), theirs["C_proj.weight"].T)
    equal(ours.pop("out_proj.kernel"), theirs["out_proj.weight"].T)
    equal(ours.pop("dt_down.kernel"), theirs["dt_proj_down.weight"].T)
    equal(ours.pop("dt_up.kernel"), theirs["dt_proj.weight"].T)
    equal(ours.pop("dt_bias"), np.float32(2) * theirs["dt_proj.bias"])
    equal(ours.pop("conv_kernel"), theirs["conv1d.weight"][:, 0, :].T)
    equal(ours.pop("conv_bias"), theirs["conv1d.bias"])
    equal(ours.pop("A_log"), theirs["A_log"])
    equal(ours.pop("D"), theirs["D"])
    assert not ours


def test_mamba2_layer(tmp_path, released):
    tensors = released.file_tensors("mamba2")
    folder = released.write_folder(tmp_path / "m", kind="mamba2", tensors=tensors)
    checkpoint = hf_import.load(folder)
    assert checkpoint.config.layer_types == ("mamba2", "attention") * 2
    assert checkpoint.config.ssm == SSMConfig(d_state=8, dt_rank=2, d_inner=32, d_xb=16)
    params, layer = checkpoint.params, "model.layers.0.mamba."
    rows = tensors[layer + "in_proj.weight"]
    # [z, x, B, C, dt] of widths E = 32, X = 16, X = 16, E = 32, H = 4.
    equal(params["layers.0.mamba2.z_proj.kernel"], rows[:32].T)
    equal(params["layers.0.mamba2.x_proj.kernel"], rows[32:48].T)
    equal(params["layers.0.mamba2.B_proj.kernel"], rows[48:64].T)
    equal(params["layers.0.mamba2.C_proj.kernel"], rows[64:96].T)
    equal(params["layers.0.mamba2.dt_proj.kernel"], rows[96:100].T)
    equal(
        params["layers.0.mamba2.conv_kernel"], tensors[layer + "conv1d.weight"][:, 0].T
    )
    equal(params["layers.0.mamba2.norm.scale"], tensors[layer + "norm.weight"])
    equal(
        params["layers.0.mamba2.out_proj.kernel"], tensors[layer + "out_proj.weight"].T
    )
    for ours, theirs in (
        ("conv_bias", "conv1d.bias"),
        ("dt_bias", "dt_bias"),
        ("A_log", "A_log"),
        ("D", "D"),
    ):
        equal(params[f"layers.0.mamba2.{ours}"], tensors[layer + theirs])


def state_spaces_tensors(released, embedding="embedding"):
    rng = np.random.default_rng(3)
    d_inner, dt_rank, d_state = 48, 2, 16
    shapes = {f"backbone.{embedding}.weight": (40, 24), "backbone.norm_f.weight": (24,)}
    for i in range(2):
        layer = {
            "norm.weight": (24,),
            "mixer.in_proj.weight": (2 * d_inner, 24),
            "mixer.conv1d.weight": (d_inner, 1, 4),
            "mixer.conv1d.bias": (d_inner,),
            "mixer.x_proj.weight": (dt_rank + 2 * d_state, d_inner),
            "mixer.dt_proj.weight": (d_inner, dt_rank),
            "mixer.dt_proj.bias": (d_inner,),
            "mixer.A_log": (d_inner, d_state),
            "mixer.D": (d_inner,),
            "mixer.out_proj.weight": (24, d_inner),
        }
        shapes |= {f"backbone.layers.{i}.{name}": s for name, s in layer.items()}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


STATE_SPACES = {
    "d_model": 24,
    "n_layer": 2,
    "vocab_size": 35,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
TRANSFORMERS_MAMBA = {
    "model_type": "mamba",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "state_size": 16,
    "time_step_rank": 2,
    "conv_kernel": 4,
    "expand": 2,
    "use_bias": False,
    "use_conv_bias": True,
    "eos_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "embedding"),
    [(STATE_SPACES, "embedding"), (TRANSFORMERS_MAMBA, "embeddings")],
)
def test_pure_mamba(tmp_path, released, config, embedding):
    tensors = state_spaces_tensors(released, embedding)
    tensors["lm_head.weight"] = tensors[f"backbone.{embedding}.weight"]
    folder = released.write_folder(tmp_path / "m", tensors=tensors, config=config)
    checkpoint = hf_import.load(folder)
    params, layer = checkpoint.params, "backbone.layers.1.mixer."
    assert checkpoint.config.layer_types == ("mamba", "mamba")
    assert checkpoint.config.vocab_size == 40  # 35 padded to a multiple of 8
    assert checkpoint.config.tie_embeddings
    assert checkpoint.config.d_ff == 0
    assert checkpoint.config.ssm == SSMConfig(
        d_state=16, dt_rank=2, d_inner=48, d_xb=48, inputs_from="conv"
    )
    equal(params["embed.embedding"], tensors[f"backbone.{embedding}.weight"])
    equal(params["final_norm.scale"], tensors["backbone.norm_f.weight"])
    equal(params["layers.1.input_norm.scale"], tensors["backbone.layers.1.norm.weight"])
    equal(
        params["layers.1.mamba.x_proj.kernel"], tensors[layer + "in_proj.weight"][:48].T
    )
    equal(
        params["layers.1.mamba.z_proj.kernel"], tensors[layer + "in_proj.weight"][48:].T
    )
    small = tensors[layer + "x_proj.weight"]
    equal(params["layers.1.mamba.dt_down.kernel"], small[:2].T)
    equal(params["layers.1.mamba.B_proj.kernel"], small[2:18].T)
    equal(params["layers.1.mamba.C_proj.kernel"], small[18:].T)
    equal(params["layers.1.mamba.dt_up.kernel"], tensors[layer + "dt_proj.weight"].T)
    # Pure Mamba adds this bias once: it is not doubled.
    equal(params["layers.1.mamba.dt_bias"], tensors[layer + "dt_proj.bias"])
    equal(
        params["layers.1.mamba.conv_kernel"], tensors[layer + "conv1d.weight"][:, 0].T
    )
    equal(params["layers.1.mamba.conv_bias"], tensors[layer + "conv1d.bias"])
    equal(params["layers.1.mamba.A_log"], tensors[layer + "A_log"])
    equal(params["layers.1.mamba.D"], tensors[layer + "D"])
    equal(
        params["layers.1.mamba.out_proj.kernel"], tensors[layer + "out_proj.weight"].T
    )
    assert len(params) == 2 + 2 * 13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_dtype_is_kept(tmp_path, released, dtype):
    tensors = released.file_tensors("mamba", dtype)
    folder = released.write_folder(tmp_path / "m", kind="mamba", tensors=tensors)
    params = hf_import.load(folder).params
    assert {value.dtype.name for value in params.values()} == {dtype}
    equal(
        params["layers.0.mamba.C_proj.kernel"][3],
        tensors["model.layers.0.mamba.C_proj.weight"][:, 3],
    )


@pytest.mark.parametrize("dtype", ["bfloat16", ml_dtypes.bfloat16, np.dtype("float16")])
def test_requested_dtype_spares_the_scan(tmp_path, released, dtype):
    tensors = released.file_tensors("mamba2")
    folder = released.write_folder(tmp_path / "m", kind="mamba2", tensors=tensors)
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for name, value in hf_import.load(folder, dtype=dtype).params.items():
        exact = name.endswith((".A_log", ".D"))
        assert value.dtype == (np.float32 if exact else wanted), name
    equal(
        hf_import.load(folder, dtype=dtype).params["lm_head.kernel"],
        tensors["lm_head.weight"].astype(wanted).T,
    )


@pytest.mark.parametrize("dtype", ["int8", "float64", "no such type", 3])
def test_refused_dtype(tmp_path, released, dtype):
    fails(released.write_folder(tmp_path / "m"), str(dtype), "bfloat16", dtype=dtype)


def test_shards(tmp_path, released):
    tensors = released.file_tensors()
    items = list(tensors.items())
    shards = [dict(items[2::3]), dict(items[::3]), dict(items[1::3])]
    whole = hf_import.load(released.write_folder(tmp_path / "a", tensors=tensors))
    split = hf_import.load(released.write_shards(tmp_path / "b", shards))
    released.assert_same_bits(split.params, whole.params)
    assert split.config == whole.config


def test_ignorable_tensors(tmp_path, released):
    tensors = released.file_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config = released.llama_json(tie_word_embeddings=True)
    folder = released.write_folder(tmp_path / "m", tensors=tensors, config=config)
    assert "lm_head.kernel" not in hf_import.load(folder).params


def test_streams_one_tensor_at_a_time(tmp_path, released):
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal([12 * n if n > 4 else n for n in value.shape])
        for name, value in released.file_tensors().items()
    }
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    config = released.llama_json(
        vocab_size=480,
        hidden_size=288,
        intermediate_size=336,
        head_dim=96,
    )
    folder = released.write_folder(tmp_path / "m", tensors=tensors, config=config)
    total = sum(value.nbytes for value in tensors.values())
    largest = max(value.nbytes for value in tensors.values())
    assert total > 12 * largest
    for dtype, kept in ((None, total), ("bfloat16", total // 2)):
        tracemalloc.start()
        params = hf_import.load(folder, dtype=dtype).params
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept < peak < kept + 1.2 * largest + 200_000
        del params


def loaded_config(tmp_path, released, config, kind="attention", **kwargs):
    folder = released.write_folder(tmp_path / "m", kind=kind, config=config, **kwargs)
    return hf_import.load(folder).config


def test_plain_config(tmp_path, released):
    config = loaded_config(tmp_path, released, released.llama_json())
    assert (config.vocab_size, config.d_model, config.d_ff) == (40, 24, 28)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 2, 8)
    assert config.layer_types == ("attention",) * 4
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 500000.0)
    assert config.rope_scaling is None
    assert config.sliding_window is None
    assert config.max_position_embeddings == 128
    assert config.model_type == "llama"
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.pad_token_id is None
    assert not (config.tie_embeddings or config.attention_bias or config.qk_norm)
    assert config.ssm is None


@pytest.mark.parametrize("keys", ["four", "four_old", "five"])
def test_llama3_rope_in_all_spellings(tmp_path, released, keys):
    spelled = {
        "four": {"rope_theta": 1e5, "rope_scaling": LLAMA3},
        "four_old": {
            "rope_theta": 100000,
            "rope_scaling": {
                "type" if k == "rope_type" else k: LLAMA3[k] for k in LLAMA3
            },
        },
        "five": {
            "rope_theta": "absent",
            "rope_scaling": "absent",
            "rope_parameters": {**LLAMA3, "rope_theta": 1e5},
        },
    }
    config = loaded_config(tmp_path, released, released.llama_json(**spelled[keys]))
    assert config.rope_theta == 1e5
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)


def test_default_rope_parameters(tmp_path, released):
    values = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    values = released.llama_json(rope_theta="absent", **values)
    config = loaded_config(tmp_path, released, values)
    assert (config.rope_theta, config.rope_scaling) == (7.0, None)


@pytest.mark.parametrize("head_dim", [None, "absent"])
def test_head_dim_defaults_to_a_share_of_d_model(tmp_path, released, head_dim):
    values = released.llama_json(head_dim=head_dim, hidden_size=32)
    tensors = {
        k: np.zeros([32 if n == 24 else n for n in v.shape], np.float32)
        for k, v in released.file_tensors().items()
    }
    config = loaded_config(tmp_path, released, values, tensors=tensors)
    assert config.head_dim == 8


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),  # what transformers assumes
        ({"model_type": "llama", "sliding_window": 16}, None),
        (
            {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 0},
            None,
        ),
        ({"sliding_window": 16}, None),
        (
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
            16,
        ),
        (
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 9},
            None,
        ),
        (
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "max_window_layers": 2,
                "layer_types": ["sliding_attention"] * 4,
            },
            16,
        ),
    ],
)
def test_sliding_window(tmp_path, released, changes, window):
    tensors = released.file_tensors()
    if "model_type" not in changes:
        changes = {"model_type": "qwen3", **changes}
        for i in range(4):
            for n in ("q_norm", "k_norm"):
                tensors[f"model.layers.{i}.self_attn.{n}.weight"] = np.ones(
                    8, np.float32
                )
    values = released.llama_json(**changes)
    config = loaded_config(tmp_path, released, values, tensors=tensors)
    assert config.sliding_window == window
    assert config.qk_norm == (config.model_type == "qwen3")


def test_mixed_windows_are_refused(tmp_path, released):
    values = released.llama_json(
        model_type="qwen2",
        sliding_window=16,
        use_sliding_window=True,
        max_window_layers=2,
    )
    folder = released.write_folder(tmp_path / "m", config=values)
    fails(folder, "sliding_attention", "full_attention")


def test_generation_config_wins(tmp_path, released):
    folder = released.write_folder(
        tmp_path / "m", config=released.llama_json(eos_token_id=[2, 3])
    )
    assert hf_import.load(folder).config.eos_token_ids == (2, 3)
    generation = {"eos_token_id": [5, 6, 7], "pad_token_id": 9, "bos_token_id": 4}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = hf_import.load(folder).config
    assert config.eos_token_ids == (5, 6, 7)
    assert (config.bos_token_id, config.pad_token_id) == (1, 9)


def test_hybrid_config_without_d_inner(tmp_path, released):
    # Older files have no d_inner, or null; it then is expand * d_model.
    tensors = {
        k: np.zeros([32 if n == 24 else n for n in v.shape], np.float32)
        for k, v in released.file_tensors("mamba").items()
    }
    values = released.llama_json(hidden_size=32)
    for d_inner in (None, "absent"):
        mamba = released.mamba_json("mamba", d_model=32, d_inner=d_inner)
        config = loaded_config(
            tmp_path, released, values, kind="mamba", tensors=tensors, mamba=mamba
        )
        assert config.ssm == SSMConfig(d_state=16, dt_rank=2, d_inner=32, d_xb=16)


def test_unknown_tensor(tmp_path, released):
    tensors = released.file_tensors()
    tensors["model.layers.0.self_attn.surprise.weight"] = np.ones(3, np.float32)
    folder = released.write_folder(tmp_path / "m", tensors=tensors)
    fails(folder, "unknown", "'model.layers.0.self_attn.surprise.weight'", str(folder))


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.3.mlp.up_proj.weight"]
)
def test_missing_tensor(tmp_path, released, name):
    tensors = released.file_tensors()
    del tensors[name]
    folder = released.write_folder(tmp_path / "m", tensors=tensors)
    fails(folder, "missing", repr(name), str(folder))


def test_many_missing_tensors_are_counted(tmp_path, released):
    config = released.llama_json(num_hidden_layers=5)
    folder = released.write_folder(tmp_path / "m", config=config)
    fails(folder, "'model.layers.4.input_layernorm.weight' (and 8 more)")


def test_wrong_shape(tmp_path, released):
    tensors = released.file_tensors()
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = tensors[name].T
    folder = released.write_folder(tmp_path / "m", tensors=tensors)
    fails(folder, name, "(24, 16)", "(16, 24)", str(folder))


def test_tensor_set_twice(tmp_path, released):
    items = list(released.file_tensors().items())
    shards = [dict(items[:20]), dict(items[19:])]
    folder = released.write_shards(tmp_path / "m", shards)
    fails(folder, repr(items[19][0]), "twice", "model-00001-of", "model-00002-of")


def test_embedding_under_both_names(tmp_path, released):
    tensors = state_spaces_tensors(released)
    tensors["backbone.embeddings.weight"] = tensors["backbone.embedding.weight"]
    folder = released.write_folder(tmp_path / "m", tensors=tensors, config=STATE_SPACES)
    fails(folder, "twice", "'backbone.embeddings.weight'")


def test_tied_head_that_differs(tmp_path, released):
    config = released.llama_json(tie_word_embeddings=True)
    folder = released.write_folder(tmp_path / "m", config=config)
    fails(folder, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_file(tmp_path, released, size):
    folder = released.write_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    fails(folder, str(path), "download or export it again")


def test_shard_missing(tmp_path, released):
    items = list(released.file_tensors().items())
    folder = released.write_shards(tmp_path / "m", [dict(items[:20]), dict(items[20:])])
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, "model-00002-of-00002.safetensors", "missing")


def test_index_that_disagrees(tmp_path, released):
    items = list(released.file_tensors().items())
    name = "model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(dict(items), name) | {"model.extra.weight": name}
    folder = released.write_shards(tmp_path / "m", [dict(items)], weight_map)
    fails(folder, "model.extra.weight", name)


def test_single_file_and_index(tmp_path, released):
    folder = released.write_shards(tmp_path / "m", [released.file_tensors()])
    released.write_folder(tmp_path / "m")
    fails(folder, "model.safetensors.index.json", "stale")


def test_wrong_stored_dtype(tmp_path, released):
    tensors = released.file_tensors()
    tensors["model.norm.weight"] = np.ones(24, np.int8)
    folder = released.write_folder(tmp_path / "m", tensors=tensors)
    fails(folder, "model.norm.weight", "I8", "dequantize")


def test_no_config(tmp_path, released):
    folder = released.write_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    fails(folder, str(folder / "config.json"), "missing")


@pytest.mark.parametrize("text", ["{", "[]", "\x00\xff"])
def test_damaged_json(tmp_path, released, text):
    folder = released.write_folder(tmp_path / "m")
    (folder / "config.json").write_text(text)
    fails(folder, str(folder / "config.json"), "download or export it again")


def test_no_weights(tmp_path, released):
    folder = released.write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    fails(folder, str(folder), "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": "absent", "architectures": ["Foo"]}, ["'Foo'", "llama"]),
        ({"hidden_size": "absent"}, ["'hidden_size'"]),
        ({"hidden_size": "24"}, ["'hidden_size'", "int"]),
        ({"hidden_act": "gelu"}, ["'hidden_act'", "'gelu'", "'silu'"]),
        ({"mlp_bias": True}, ["'mlp_bias'"]),
        ({"attention_bias": True}, ["'attention_bias'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"partial_rotary_factor": 0.5}, ["'partial_rotary_factor'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "llama3"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["'yarn'"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}},
            ["'dynamic'"],
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["'factor'"]),
    ],
)
def test_unsupported_config(tmp_path, released, changes, words):
    config = released.llama_json(**changes)
    fails(released.write_folder(tmp_path / "m", config=config), "config.json", *words)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mamba", {"d_model": 23}, ["'d_model'", "23"]),
        ("mamba", {"n_layer": 5}, ["'n_layer'"]),
        ("mamba", {"rms_norm_eps": 1e-6}, ["'rms_norm_eps'"]),
        ("mamba", {"attn_layers": [1, 4]}, ["'attn_layers'", "3"]),
        ("mamba", {"attn_layers": "absent"}, ["'attn_layers'"]),
        ("mamba", {"d_xb": "absent"}, ["'d_xb'"]),
        ("mamba", {"surprise": 1}, ["'surprise'"]),
        ("mamba", {"ssm_cfg": {"expand": 1, "surprise": 1}}, ["'surprise'"]),
        ("mamba", {"ssm_cfg": {"repeat_kv_before_conv": False}}, ["repeat_kv"]),
        ("mamba2", {"ssm_cfg": {"ngroups": 2, "d_state": 16}}, ["ngroups"]),
        ("mamba2", {"ssm_cfg": {"ngroups": 4, "d_state": 16}}, ["d_inner"]),
        ("mamba2", {"attn_layers": [0, 1, 3]}, ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_unsupported_mamba_config(tmp_path, released, kind, changes, words):
    mamba = released.mamba_json(kind, **changes)
    fails(released.write_folder(tmp_path / "m", kind=kind, mamba=mamba), *words)


def test_both_mamba_kinds_in_one_model(tmp_path, released):
    tensors = released.file_tensors("mamba")
    tensors["model.layers.2.mamba.in_proj.weight"] = np.ones(3, np.float32)
    folder = released.write_folder(tmp_path / "m", kind="mamba", tensors=tensors)
    fails(folder, "both Mamba and Mamba-2")


@pytest.mark.parametrize(
    "changes",
    [
        {"ssm_cfg": {"layer": "Mamba2"}},
        {"ssm_cfg": {"surprise": 1}},
        {"rms_norm": False},
        {"attn_layer_idx": [1]},
        {"d_intermediate": 64},
    ],
)
def test_unsupported_state_spaces_config(tmp_path, released, changes):
    folder = released.write_folder(
        tmp_path / "m",
        tensors=state_spaces_tensors(released),
        config=STATE_SPACES | changes,
    )
    (key,) = changes
    fails(folder, next(iter(changes[key])) if key == "ssm_cfg" else key)


@pytest.mark.parametrize(
    "name",
    ["./nothing", "/no/folder", "~/nothing/x", "a/b/c", "nothing", "nothing/", ""],
)
def test_no_such_folder(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    fails(name, "no such folder", repr(name))


def test_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    fails(tmp_path / "nothing", "no such folder")


def test_file_instead_of_folder(tmp_path, released):
    folder = released.write_folder(tmp_path / "m")
    fails(folder / "model.safetensors", "is a file")


def test_hub_id_is_downloaded(tmp_path, released, monkeypatch):
    calls = []

    def snapshot_download(repo_id, *, allow_patterns):
        calls.append((repo_id, allow_patterns))
        return str(released.write_folder(tmp_path / "cache"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = hf_import.load("some-org/some-model")
    assert checkpoint.source == tmp_path / "cache"
    ((repo_id, patterns),) = calls
    assert repo_id == "some-org/some-model"
    assert "model*.safetensors" in patterns
    assert not [p for p in patterns if "bin" in p]  # not both formats


def test_hub_repository_with_torch_files_only(tmp_path, released, monkeypatch):
    calls = []
    folder = released.write_folder(tmp_path / "cache")
    (folder / "model.safetensors").rename(tmp_path / "weights")

    def snapshot_download(repo_id, *, allow_patterns):
        calls.append(allow_patterns[-1])
        if "pytorch_model*.bin" in allow_patterns:
            (tmp_path / "weights").rename(folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hf_import.local_folder("some-org/some-model") == folder
    assert calls == ["model*.safetensors", "pytorch_model*.bin"]


def test_hub_failure_is_one_line(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise RuntimeError("401 Client Error.\n\nRepository Not Found\nand so on")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fails(
        "some-org/some-model", "'some-org/some-model'", "401 Client Error.", "network"
    )


def test_torch_file_without_torch(tmp_path, released, monkeypatch):
    folder = released.write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(folder, "pytorch_model.bin", "torch", "install")
