"""Params to the released formats: Hugging Face folders that other code can load.

hf_export.save("out/hybrid", config, params, assets_from=teacher.source)
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mil_jax.array_types import Params
from mil_jax.checkpoint import hf_config, key_table
from mil_jax.checkpoint.folders import new_folder
from mil_jax.checkpoint.hf_import import MAMBA_CONFIG
from mil_jax.checkpoint.tensor_files import read_json
from mil_jax.config import ModelConfig
from mil_jax.errors import UserError

# Tokenizer and chat template; generation_config.json is merged, not copied.
ASSETS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
GENERATION_CONFIG = "generation_config.json"


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    assets_from: str | os.PathLike[str] | None = None,
    dtype: object = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that `hf_import.load` reads back bit for bit.

    All-attention models load with `transformers.AutoModelForCausalLM`; hybrids have the
    format of the published ones, with a mamba_config.json. The folder appears under its
    name only once it is complete. The peak of host memory is the model plus one shard.

    Args:
        path: Folder to create; it must not exist or be empty.
        config: Architecture; pure Mamba is not supported.
        params: Exactly the params of `config`, NumPy or JAX.
        assets_from: Folder with the tokenizer's files, usually `Checkpoint.source`.
        dtype: "float32", "bfloat16" or "float16"; `A_log` and `D` are then written as
            float32. None writes every tensor as it is.
        max_shard_bytes: Weights above this size are split into files of at most this
            size (a single larger tensor gets its own).

    Raises:
        UserError: The folder is not empty, params and config disagree, or writing
            failed.
    """
    target = Path(path).expanduser().resolve()
    wanted = None if dtype is None else key_table.as_float_dtype(dtype)
    assets = None if assets_from is None else Path(assets_from).expanduser()
    _check_folders(target, assets)
    tensors = _plan(config, params, wanted)
    jsons = _json_files(config, tensors, wanted, assets)
    with new_folder(target) as partial:
        for name, values in jsons.items():
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        for name in ASSETS:
            if assets is not None and (assets / name).is_file():
                shutil.copyfile(assets / name, partial / name)
        _write_tensors(partial, tensors, max_shard_bytes)


def _check_folders(target: Path, assets: Path | None) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; choose another folder or remove it")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; choose another folder")
    if assets is not None and not assets.is_dir():
        raise UserError(f"no such folder: {str(assets)!r} (assets_from)")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor to be written; it is built only when its shard is."""

    row: key_table.Row
    params: Params
    dtype: np.dtype | None
    nbytes: int

    def value(self) -> np.ndarray:
        parts = [
            key_table.converted(name, np.asarray(self.params[name]), self.dtype)
            for name in self.row.params
        ]
        # The writer takes a pointer and a length: a transposed view would be garbled.
        return np.ascontiguousarray(self.row.transform.pack(parts))


def _plan(config: ModelConfig, params: Params, dtype: np.dtype | None) -> list[_Tensor]:
    """Returns the tensors to write, after checking that params and config agree."""
    if key_table.is_pure_mamba(config):
        raise UserError("export of pure Mamba models is not supported; use Orbax")
    shapes = key_table.param_shapes(config)
    for name in [*shapes, *params]:
        if name not in params:
            raise UserError(f"cannot export: param {name!r} is missing")
        if name not in shapes:
            raise UserError(f"cannot export: param {name!r} is not one of this model's")
        if params[name].shape != shapes[name]:
            raise UserError(
                f"cannot export: param {name!r} has shape {params[name].shape}; "
                f"expected {shapes[name]} from the config"
            )
    tensors = []
    for row in key_table.table(config):
        dtypes = {key_table.as_float_dtype(params[name].dtype) for name in row.params}
        if dtype is None and len(dtypes) > 1:
            raise UserError(
                f"cannot export: {', '.join(row.params)} share one tensor but have the "
                f"dtypes {sorted(d.name for d in dtypes)}; give `dtype`"
            )
        size = sum(int(np.prod(shapes[name])) for name in row.params)
        stored = key_table.stored_dtype(row.params[0], dtypes.pop(), dtype)
        tensors.append(_Tensor(row, params, dtype, size * stored.itemsize))
    return tensors


def _json_files(
    config: ModelConfig,
    tensors: Sequence[_Tensor],
    dtype: np.dtype | None,
    assets: Path | None,
) -> dict[str, dict[str, Any]]:
    embedding = tensors[0].params["embed.embedding"]
    name = np.dtype(dtype or embedding.dtype).name
    generation: dict[str, Any] = {"_from_model_config": True}
    if assets is not None and (assets / GENERATION_CONFIG).is_file():
        generation = read_json(assets / GENERATION_CONFIG)
    for key, value in hf_config.token_ids(config).items():
        generation.pop(key, None)
        if value is not None:
            generation[key] = value
    files = {
        "config.json": hf_config.to_hf(config, name),
        GENERATION_CONFIG: generation,
    }
    if config.is_hybrid:
        files[MAMBA_CONFIG] = hf_config.to_mamba_config(config)
    return files


def _shards(tensors: Sequence[_Tensor], max_bytes: int) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _write_tensors(folder: Path, tensors: Sequence[_Tensor], max_bytes: int) -> None:
    shards = list(_shards(tensors, max_bytes))
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(
            {tensor.row.key: tensor.value() for tensor in shard},
            folder / name,
            metadata={"format": "pt"},
        )
        # The library makes the file private to its owner.
        shutil.copymode(folder / "config.json", folder / name)
        weight_map |= {tensor.row.key: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
