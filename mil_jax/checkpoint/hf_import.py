"""Released checkpoints to params: Llama family, hybrids and pure Mamba.

checkpoint = hf_import.load("meta-llama/Llama-3.2-1B-Instruct", dtype="bfloat16")
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mil_jax.array_types import Params
from mil_jax.checkpoint import hf_config, key_table
from mil_jax.checkpoint.tensor_files import (
    TensorFile,
    first_line,
    has_weights,
    open_tensors,
    read_json,
)
from mil_jax.config import ModelConfig
from mil_jax.errors import UserError

MAMBA_CONFIG = "mamba_config.json"

# Buffers that old versions of transformers saved; they follow from the config.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")
_LM_HEAD = "lm_head.weight"
# The few old names without an owner are of no model that can be read here.
_HUB_ID = re.compile(r"[^./~][^/]*/[^/]+")
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer*", "*.tiktoken"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model read from disk.

    Attributes:
        config: Its architecture.
        params: NumPy arrays; transposed and split ones are views of what the file held.
        source: The local folder, where tokenizer and chat template lie too.
    """

    config: ModelConfig
    params: Params
    source: Path


def load(path_or_id: str | os.PathLike[str], *, dtype: object = None) -> Checkpoint:
    """Returns the model of a local folder or of a Hugging Face hub repository.

    Tensors are read one at a time: the peak is the model plus one tensor.

    Args:
        path_or_id: A folder with config.json and weights (safetensors or torch files,
            single or sharded); OWNER/NAME is taken as a hub id if it is no folder.
        dtype: "float32", "bfloat16" or "float16"; `A_log` and `D` then become float32.
            None keeps every tensor as stored.

    Raises:
        UserError: Nothing there, an architecture that is not supported, a damaged file,
            or tensors that do not fit the config.
    """
    wanted = None if dtype is None else key_table.as_float_dtype(dtype)
    folder = local_folder(path_or_id)
    with _naming(folder):
        hf = read_json(folder / "config.json")
        tensors = open_tensors(folder)
        config = _read_config(folder, hf, tensors)
        params = _read_params(config, tensors, wanted)
    return Checkpoint(config=config, params=params, source=folder)


def read_config(folder: Path) -> ModelConfig:
    """Returns the architecture of a folder's model; its weights are not read.

    Raises:
        UserError: As `load`.
    """
    with _naming(folder):
        hf = read_json(folder / "config.json")
        return _read_config(folder, hf, open_tensors(folder))


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Puts the folder into messages that lack it."""
    try:
        yield
    except UserError as error:
        if str(folder) in str(error):
            raise
        raise UserError(f"{folder}: {error}") from error


def local_folder(path_or_id: str | os.PathLike[str]) -> Path:
    """Returns the folder of a checkpoint, downloading it first if it is a hub id."""
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise UserError(f"{path} is a file; give the folder that holds the checkpoint")
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"no such folder: {name!r}; give a folder with a checkpoint or a hub id "
            "such as meta-llama/Meta-Llama-3-8B-Instruct"
        )
    return _download(name)


def _download(hub_id: str) -> Path:
    import huggingface_hub

    def fetch(weights: str) -> Path:
        patterns = [*_SMALL_FILES, weights]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))

    try:
        folder = fetch("model*.safetensors")
        # Torch files only where there is nothing else: many repositories have both.
        if not has_weights(folder):
            folder = fetch("pytorch_model*.bin")
    # The client lets through errors of its own, of the HTTP library and of the disk.
    except Exception as error:
        raise UserError(
            f"{hub_id!r} is not a local folder and could not be downloaded from the "
            f"Hugging Face hub ({type(error).__name__}: {first_line(error)}); check "
            "the id, the network and your access (`hf auth login`), or give a local "
            "folder"
        ) from error
    return folder


def _read_config(
    folder: Path, hf: hf_config.Json, tensors: Mapping[str, TensorFile]
) -> ModelConfig:
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    if (folder / MAMBA_CONFIG).is_file():
        mamba = read_json(folder / MAMBA_CONFIG)
        base = hf_config.attention_config(hf, generation)
        return hf_config.hybrid_config(
            base, mamba, hf_config.hybrid_kind(mamba, tensors)
        )
    if hf_config.is_state_spaces(hf):
        return hf_config.state_spaces_config(hf, generation)
    return hf_config.attention_config(hf, generation)


def _read_params(
    config: ModelConfig, tensors: Mapping[str, TensorFile], dtype: np.dtype | None
) -> Params:
    shapes = key_table.param_shapes(config)
    keys = _match(config, tensors, shapes)
    if config.tie_embeddings and _LM_HEAD in tensors:
        _check_tied(tensors, next(iter(keys.values())))
    params: Params = {}
    for row, key in keys.items():
        value = tensors[key].read(key)
        parts = row.transform.unpack(value, [shapes[name] for name in row.params])
        for name, part in zip(row.params, parts, strict=True):
            params[name] = key_table.converted(name, part, dtype)
    return params


def _match(
    config: ModelConfig,
    tensors: Mapping[str, TensorFile],
    shapes: Mapping[str, key_table.Shape],
) -> dict[key_table.Row, str]:
    """Returns each row's tensor name, the embedding's first; all are checked."""
    found: dict[key_table.Row, str] = {}
    missing = []
    for row in key_table.table(config):
        present = [key for key in (row.key, *row.aliases) if key in tensors]
        if len(present) > 1:
            raise UserError(
                f"tensor {present[0]!r} is set twice, also as {present[1]!r}"
            )
        if present:
            found[row] = present[0]
        else:
            missing.append(row.key)
    known = set(found.values()) | ({_LM_HEAD} if config.tie_embeddings else set())
    unknown = [k for k in tensors if k not in known and not _BUFFERS.search(k)]
    if missing or unknown:
        what = f"missing tensor {_some(missing)}" if missing else ""
        what += ", " if missing and unknown else ""
        what += f"unknown tensor {_some(unknown)}" if unknown else ""
        raise UserError(
            f"{what}; the files are incomplete or belong to another config.json"
        )
    for row, key in found.items():
        expected = row.transform.file_shape([shapes[name] for name in row.params])
        if tensors[key].shape(key) != expected:
            raise UserError(
                f"tensor {key!r} has shape {tensors[key].shape(key)}; expected "
                f"{expected} from the config"
            )
    return found


def _some(keys: list[str]) -> str:
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return f"{keys[0]!r}{more}"


def _check_tied(tensors: Mapping[str, TensorFile], embedding: str) -> None:
    """Refuses an LM head that differs from the embedding it is said to be tied to."""
    head = tensors[_LM_HEAD].read(_LM_HEAD)
    if not np.array_equal(head, tensors[embedding].read(embedding)):
        raise UserError(
            f"tensor {_LM_HEAD!r} differs from {embedding!r} although config.json ties "
            "them; set tie_word_embeddings to false there"
        )
