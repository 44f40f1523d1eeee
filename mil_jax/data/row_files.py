"""Rows of JSON, JSON lines and Parquet files and of TFDS, with random access."""

import bisect
import codecs
import glob
import gzip
import json
import mmap
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from mil_jax.errors import UserError

Row: TypeAlias = Mapping[str, Any]

_EXTRA = "install the optional packages: pip install 'mil_jax[data]'"


class RowError(UserError):
    """A row is wrong; whoever knows the file and line adds them."""


@runtime_checkable
class Rows(Protocol):
    """Random access to the rows of one file or dataset."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int) -> Row:
        """Returns a row; `RowError` if it is malformed."""

    def where(self, index: int) -> str:
        """Returns the file and line of a row, for messages."""


def open_rows(name: str) -> Sequence[Rows]:
    """Returns the rows behind a path, a glob or a `tfds:NAME:SPLIT`.

    Raises:
        UserError: Nothing is there, the format is unknown, or a package is missing.
    """
    if name.startswith("tfds:"):
        return [_tfds(name)]
    paths = find_files(name)
    files = [_open_file(Path(path)) for path in paths]
    for path, rows in zip(paths, files, strict=True):
        if not len(rows):
            raise UserError(f"{path} holds no rows")
    return files


def find_files(name: str) -> list[str]:
    """Returns the files behind a path or a glob, in order.

    Raises:
        UserError: There is none.
    """
    paths = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
    if not paths:
        raise UserError(f"no file matches {name!r}; check the path of the data")
    return paths


def _open_file(path: Path) -> Rows:
    readers = {
        ".jsonl": JsonLines,
        ".jsonl.gz": JsonLines,
        ".json": JsonArray,
        ".parquet": Parquet,
    }
    for suffix, reader in readers.items():
        if path.name.endswith(suffix):
            try:
                return reader(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error}") from error
    raise UserError(f"{path} has an unknown format; supported: {', '.join(readers)}")


def _as_row(value: Any) -> Row:
    if not isinstance(value, Mapping):
        raise RowError(f"expected an object, got {type(value).__name__}")
    return value


class JsonLines:
    """One JSON object per line; blank lines do not count."""

    def __init__(self, path: Path) -> None:
        """Finds the lines; a .gz file is unpacked into memory, others are mapped."""
        self._path = path
        self._data: bytes | mmap.mmap = b""
        if path.name.endswith(".gz"):
            try:
                self._data = gzip.decompress(path.read_bytes())
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path} is no whole gzip file: {error}") from error
        elif path.stat().st_size:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # (line number, start, stop) of every line that is not blank
        self._lines: list[tuple[int, int, int]] = []
        pattern = re.compile(rb"[^\n]+")
        # Editors of some systems begin a file with a mark.
        has_mark = self._data[:3] == codecs.BOM_UTF8
        line, position = 1, len(codecs.BOM_UTF8) if has_mark else 0
        for match in pattern.finditer(self._data, position):
            # Only newlines lie between two matches, one per line passed.
            line += match.start() - position
            position = match.end()
            if not match.group().isspace():
                self._lines.append((line, match.start(), match.end()))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        """Parses one line."""
        _, start, stop = self._lines[index]
        try:
            return _as_row(json.loads(self._data[start:stop].decode("utf-8")))
        except ValueError as error:
            if isinstance(error, RowError):
                raise
            raise RowError(f"not valid JSON ({error})") from error

    def line(self, index: int) -> int:
        """Returns a row's line number, from 1."""
        return self._lines[index][0]

    def where(self, index: int) -> str:
        """Returns file and line number."""
        return f"{self._path}, line {self.line(index)}"


class JsonArray:
    """A JSON file with a list of objects, read into memory."""

    def __init__(self, path: Path) -> None:
        """Reads the file."""
        self._path = path
        try:
            values = json.loads(path.read_text("utf-8-sig"))
        except json.JSONDecodeError as error:
            hint = "; name a file of JSON lines .jsonl" if "Extra" in error.msg else ""
            raise UserError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg}){hint}"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from error
        if not isinstance(values, list):
            raise UserError(f"{path} is not a list of objects")
        self._values = values

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._values)

    def __getitem__(self, index: int) -> Row:
        """Returns one object."""
        return _as_row(self._values[index])

    def where(self, index: int) -> str:
        """Returns file and entry number, from 1."""
        return f"{self._path}, entry {index + 1}"


class Parquet:
    """A Parquet file, read one row group at a time."""

    def __init__(self, path: Path) -> None:
        """Opens the file."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow; {_EXTRA}") from error
        self._path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is not a Parquet file: {error}") from error
        sizes = self._file.metadata
        self._ends: list[int] = []
        for group in range(sizes.num_row_groups):
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + sizes.row_group(group).num_rows)
        self._cached: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Returns one row; the row group read last stays in memory."""
        group = bisect.bisect_right(self._ends, index)
        if self._cached[0] != group:
            self._cached = (group, self._file.read_row_group(group))
        start = self._ends[group - 1] if group else 0
        return self._cached[1].slice(index - start, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        """Returns file and row number, from 1."""
        return f"{self._path}, row {index + 1}"


class TfdsRows:
    """A TensorFlow dataset with random access."""

    def __init__(self, name: str, split: str, source: Sequence[Any]) -> None:
        """Wraps a `tfds.data_source`."""
        self._name, self._split, self._source = name, split, source

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        """Returns one row in plain Python types."""
        return _as_row(_plain(self._source[index]))

    def where(self, index: int) -> str:
        """Returns dataset, split and row number, from 1."""
        return f"tfds dataset {self._name}, split {self._split}, row {index + 1}"


def _tfds(spec: str) -> Rows:
    name, _, split = spec.removeprefix("tfds:").rpartition(":")
    if not name or not split:
        raise UserError(f"data spec {spec!r} is not tfds:NAME:SPLIT")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{spec} needs tensorflow_datasets; {_EXTRA}") from error
    try:
        return TfdsRows(name, split, tfds.data_source(name, split=split))
    except Exception as error:  # TFDS raises its own types for unknown names and splits
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot open {spec}: {reason}") from error


def _plain(value: Any) -> Any:
    """Turns bytes to text and arrays to lists, at any depth."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
