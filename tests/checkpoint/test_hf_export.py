"""Export: round trips bit for bit, sharding, assets, and nothing half-written."""

import dataclasses
import json
import os
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from mil_jax.checkpoint import hf_export, hf_import, key_table
from mil_jax.config import ModelConfig, RopeScaling, SSMConfig
from mil_jax.errors import UserError

KINDS = ("attention", "mamba", "mamba2")
LLAMA = ModelConfig(
    vocab_size=40,
    d_model=24,
    layer_types=("attention",) * 2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=28,
    eos_token_ids=(2,),
)
CONFIGS = {
    "llama3": dataclasses.replace(
        LLAMA,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
        tie_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2, 3),
        pad_token_id=4,
    ),
    "mistral": dataclasses.replace(LLAMA, model_type="mistral", sliding_window=16),
    "mistral_full": dataclasses.replace(LLAMA, model_type="mistral", eos_token_ids=()),
    "qwen2": dataclasses.replace(LLAMA, model_type="qwen2", attention_bias=True),
    "qwen3_window": dataclasses.replace(
        LLAMA, model_type="qwen3", qk_norm=True, sliding_window=8
    ),
    "mamba": dataclasses.replace(
        LLAMA,
        layer_types=("mamba", "attention"),
        ssm=SSMConfig(d_state=16, dt_rank=2, d_inner=32, d_xb=16),
    ),
    "mamba_odd_sizes": dataclasses.replace(
        LLAMA,
        layer_types=("mamba", "mamba"),
        ssm=SSMConfig(d_state=8, dt_rank=5, d_inner=32, d_xb=16, d_conv=3),
    ),
    "mamba2_qwen2": dataclasses.replace(
        LLAMA,
        layer_types=("mamba2", "attention"),
        ssm=SSMConfig(d_state=8, dt_rank=2, d_inner=32, d_xb=16),
        model_type="qwen2",
        attention_bias=True,
    ),
}
PURE = ModelConfig(
    vocab_size=40,
    d_model=24,
    layer_types=("mamba",),
    ssm=SSMConfig(d_state=16, dt_rank=2, d_inner=48, d_xb=48, inputs_from="conv"),
    model_type="mamba",
)


def random_params(config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in key_table.param_shapes(config).items()
    }


def refuses(words, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        hf_export.save(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_of_import_gives_the_same_file(tmp_path, released, kind, dtype):
    tensors = released.file_tensors(kind, dtype)
    # Bits that arithmetic would lose: NaN with a payload, infinities, subnormals, -0.
    odd = tensors["model.layers.0.mlp.up_proj.weight"]
    size = odd.dtype.itemsize
    bits = odd.reshape(-1).view(f"u{size}")
    bits[:5] = [(1 << (8 * size - 1)) - 3, 1, 3, 1 << (8 * size - 1), 0]
    source = released.write_folder(tmp_path / "a", kind=kind, tensors=tensors)
    first = hf_import.load(source)
    hf_export.save(tmp_path / "b", first.config, first.params)
    released.assert_same_bits(released.read_safetensors(tmp_path / "b"), tensors)
    second = hf_import.load(tmp_path / "b")
    assert second.config == first.config
    released.assert_same_bits(second.params, first.params)
    assert (tmp_path / "b" / "mamba_config.json").exists() == (kind != "attention")


@pytest.mark.parametrize("name", CONFIGS)
def test_import_of_export_gives_the_same_model(tmp_path, released, name):
    config = CONFIGS[name]
    params = random_params(config)
    hf_export.save(tmp_path / "m", config, params)
    checkpoint = hf_import.load(tmp_path / "m")
    assert checkpoint.config == config
    released.assert_same_bits(checkpoint.params, params)
    assert list(checkpoint.params) == list(hf_import.load(tmp_path / "m").params)


def test_released_dt_bias_is_half(tmp_path, released):
    params = random_params(CONFIGS["mamba"])
    params["layers.0.mamba.dt_bias"] = np.arange(32, dtype=np.float32) - 7
    hf_export.save(tmp_path / "m", CONFIGS["mamba"], params)
    stored = released.read_safetensors(tmp_path / "m")
    expected = (np.arange(32, dtype=np.float32) - 7) / 2
    np.testing.assert_array_equal(
        stored["model.layers.0.mamba.dt_proj.bias"], expected, strict=True
    )


def test_mamba_config_as_released(tmp_path, released):
    for kind, name in (("mamba", "mamba"), ("mamba2", "mamba2_qwen2")):
        config = dataclasses.replace(CONFIGS[name], d_ff=28)
        hf_export.save(tmp_path / kind, config, random_params(config))
        written = json.loads((tmp_path / kind / "mamba_config.json").read_text())
        expected = released.mamba_json(kind, n_layer=2, attn_layers=[1], vocab_size=40)
        assert written == expected


def test_jax_arrays(tmp_path, released):
    params = random_params(CONFIGS["mamba"])
    arrays = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
    hf_export.save(tmp_path / "m", CONFIGS["mamba"], arrays)
    expected = {name: np.asarray(value) for name, value in arrays.items()}
    released.assert_same_bits(hf_import.load(tmp_path / "m").params, expected)


def test_requested_dtype_spares_the_scan(tmp_path, released):
    params = random_params(CONFIGS["mamba2_qwen2"])
    hf_export.save(tmp_path / "m", CONFIGS["mamba2_qwen2"], params, dtype="bfloat16")
    expected = {
        name: value if name.endswith((".A_log", ".D")) else value.astype(released.BF16)
        for name, value in params.items()
    }
    released.assert_same_bits(hf_import.load(tmp_path / "m").params, expected)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_shards(tmp_path, released):
    params = random_params(LLAMA)
    hf_export.save(tmp_path / "one", LLAMA, params)
    hf_export.save(tmp_path / "many", LLAMA, params, max_shard_bytes=6000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert max(path.stat().st_size for path in shards) < 6000 + 2000  # and the header
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in params.values())
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    released.assert_same_bits(
        released.read_safetensors(tmp_path / "many"),
        released.read_safetensors(tmp_path / "one"),
    )
    released.assert_same_bits(hf_import.load(tmp_path / "many").params, params)


def test_memory_is_one_shard(tmp_path):
    config = dataclasses.replace(LLAMA, d_model=256, d_ff=512)
    params = random_params(config)
    total = sum(value.nbytes for value in params.values())
    tracemalloc.start()
    hf_export.save(tmp_path / "m", config, params, max_shard_bytes=total // 6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total // 12 < peak < total // 3


def test_assets_are_copied_and_generation_config_is_merged(tmp_path):
    assets = tmp_path / "teacher"
    assets.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (assets / name).write_text(f"content of {name}")
    (assets / "README.md").write_text("not an asset")
    (assets / "config.json").write_text("not an asset")
    generation = {"temperature": 0.6, "eos_token_id": [8, 9], "bos_token_id": 7}
    (assets / "generation_config.json").write_text(json.dumps(generation))
    target = tmp_path / "out" / "m"
    hf_export.save(target, LLAMA, random_params(LLAMA), assets_from=str(assets))
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (target / "tokenizer.json").read_text() == "content of tokenizer.json"
    assert json.loads((target / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "eos_token_id": 2,
    }
    assert hf_import.load(target).config == LLAMA


def test_weights_are_readable_like_the_other_files(tmp_path):
    hf_export.save(tmp_path / "m", LLAMA, random_params(LLAMA))
    modes = {path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert len(modes) == 1


def test_existing_folder(tmp_path):
    params = random_params(LLAMA)
    target = tmp_path / "m"
    target.mkdir()
    hf_export.save(target, LLAMA, params)  # an empty one is fine
    before = (target / "model.safetensors").read_bytes()
    refuses([str(target), "not empty"], target, LLAMA, random_params(LLAMA, seed=1))
    assert (target / "model.safetensors").read_bytes() == before
    refuses(["is a file"], target / "config.json", LLAMA, params)
    refuses(["no such folder"], tmp_path / "n", LLAMA, params, assets_from="./nothing")
    assert sorted(os.listdir(tmp_path)) == ["m"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_nothing_is_left_after_a_failure(tmp_path, monkeypatch, error):
    def save_file(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr("safetensors.numpy.save_file", save_file)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left|^$"):
        hf_export.save(tmp_path / "m", LLAMA, random_params(LLAMA))
    assert not list(tmp_path.iterdir())


def test_the_name_appears_last(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(
        "os.replace",
        lambda a, b: (
            seen.append((os.path.exists(b), sorted(os.listdir(a)))),
            replace(a, b),
        ),
    )
    hf_export.save(tmp_path / "m", LLAMA, random_params(LLAMA))
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert seen == [(False, names)]


def test_params_that_do_not_fit(tmp_path):
    params = random_params(LLAMA)
    name = "layers.1.attn.k_proj.kernel"
    target = tmp_path / "m"
    refuses(
        [name, "missing"], target, LLAMA, {k: params[k] for k in params if k != name}
    )
    refuses(["'extra'"], target, LLAMA, {**params, "extra": params[name]})
    wrong = {**params, name: params[name].T}
    refuses([name, "(16, 24)", "(24, 16)"], target, LLAMA, wrong)
    wrong = {**params, name: params[name].astype(np.float64)}
    refuses(["float64"], target, LLAMA, wrong)
    refuses(["int8"], target, LLAMA, params, dtype="int8")
    assert not list(tmp_path.iterdir())


def test_fused_tensor_of_two_dtypes(tmp_path):
    config = CONFIGS["mamba2_qwen2"]
    params = random_params(config)
    name = "layers.0.mamba2.dt_proj.kernel"
    params[name] = params[name].astype(np.float16)
    refuses([name, "float16", "float32"], tmp_path / "m", config, params)
    hf_export.save(tmp_path / "m", config, params, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"qk_norm": True}, ["qk_norm"]),
        ({"sliding_window": 8}, ["sliding window", "mistral"]),
    ],
)
def test_configs_that_transformers_could_not_read(tmp_path, changes, words):
    config = dataclasses.replace(LLAMA, **changes)
    refuses(words, tmp_path / "m", config, random_params(config))


def test_pure_mamba_is_not_exported(tmp_path):
    refuses(["pure Mamba", "not supported"], tmp_path / "m", PURE, random_params(PURE))


@pytest.mark.parametrize("name", [*CONFIGS, "pure"])
def test_table_covers_every_param_once(name):
    config = PURE if name == "pure" else CONFIGS[name]
    params = [param for row in key_table.table(config) for param in row.params]
    assert len(params) == len(set(params))
    assert set(params) == set(key_table.param_shapes(config))
