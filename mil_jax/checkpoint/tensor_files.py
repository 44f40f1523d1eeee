"""Weight files of a checkpoint folder, read one tensor at a time."""

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import safetensors

from mil_jax.checkpoint.key_table import Shape
from mil_jax.errors import UserError

_REDO = "download or export it again"
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class SafetensorsFile:
    """A `.safetensors` file; bfloat16 arrives as `ml_dtypes.bfloat16`."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header."""
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def keys(self) -> Iterator[str]:
        """Yields the names of the tensors."""
        yield from self._file.keys()

    def shape(self, key: str) -> Shape:
        """Returns a tensor's shape; only the header is read."""
        return tuple(self._file.get_slice(key).get_shape())

    def read(self, key: str) -> np.ndarray:
        """Returns a copy of one tensor."""
        dtype = self._file.get_slice(key).get_dtype()
        if dtype not in _SAFETENSORS_DTYPES:
            raise _wrong_dtype(self.path, key, dtype)
        return self._file.get_tensor(key)


class TorchFile:
    """A `pytorch_model*.bin` file, memory-mapped where its format allows it."""

    def __init__(self, path: Path) -> None:
        """Opens the file; raises `UserError` if torch is not installed."""
        self.path = path
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"{path} needs torch to be read; install the `torch` extra or convert "
                "the checkpoint to safetensors"
            ) from error
        self._torch = torch
        try:
            self._tensors: dict[str, Any] = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                # Only the zip format, torch's default since 1.6, can be mapped.
                mmap=zipfile.is_zipfile(path),
            )
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise _damaged(path, error) from error

    def keys(self) -> Iterator[str]:
        """Yields the names of the tensors."""
        yield from self._tensors

    def shape(self, key: str) -> Shape:
        """Returns a tensor's shape."""
        return tuple(self._tensors[key].shape)

    def read(self, key: str) -> np.ndarray:
        """Returns a copy of one tensor."""
        torch, tensor = self._torch, self._tensors[key].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
        if tensor.dtype not in (torch.float32, torch.float16):
            raise _wrong_dtype(self.path, key, str(tensor.dtype))
        return tensor.numpy().copy()


TensorFile: TypeAlias = SafetensorsFile | TorchFile


@dataclasses.dataclass(frozen=True)
class _Format:
    single: str
    index: str
    open: type[TensorFile]


FORMATS = (
    _Format("model.safetensors", "model.safetensors.index.json", SafetensorsFile),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", TorchFile),
)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights in a known format."""
    return any(
        (folder / name).is_file() for f in FORMATS for name in (f.single, f.index)
    )


def open_tensors(folder: Path) -> dict[str, TensorFile]:
    """Opens a folder's weights and returns, for every tensor, the file that has it.

    Safetensors files win over torch files if the folder has both.

    Raises:
        UserError: No weights, a missing or damaged file, or a tensor that is set twice.
    """
    for fmt in FORMATS:
        single, index = folder / fmt.single, folder / fmt.index
        if single.is_file() and index.is_file():
            raise UserError(
                f"{folder} has both {single.name} and {index.name}; remove the stale "
                "one"
            )
        if single.is_file():
            file = fmt.open(single)
            return {key: file for key in file.keys()}
        if index.is_file():
            return _open_shards(folder, index, fmt)
    raise UserError(
        f"{folder} holds no weights; expected one of "
        + ", ".join(name for f in FORMATS for name in (f.single, f.index))
    )


def _open_shards(folder: Path, index: Path, fmt: _Format) -> dict[str, TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no `weight_map`; {_REDO}")
    tensors: dict[str, TensorFile] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing but {index.name} names it")
        file = fmt.open(folder / name)
        for key in file.keys():
            if key in tensors:
                raise UserError(
                    f"tensor {key!r} is set twice, in {tensors[key].path.name} and in "
                    f"{name} of {folder}"
                )
            tensors[key] = file
    for key, name in weight_map.items():
        if key not in tensors or tensors[key].path.name != name:
            raise UserError(
                f"tensor {key!r} is not in {name} of {folder}, where {index.name} "
                f"puts it; {_REDO}"
            )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {_REDO}") from error
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {_REDO}")
    return value


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path} ({first_line(error)}); {_REDO}")


def _wrong_dtype(path: Path, key: str, dtype: str) -> UserError:
    return UserError(
        f"tensor {key!r} of {path} has dtype {dtype}; supported: float32, bfloat16 and "
        "float16 (dequantize the checkpoint first)"
    )


def first_line(error: BaseException) -> str:
    """Returns an exception's first line, or its type if it has no message."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
