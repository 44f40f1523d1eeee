"""Examples and pairs on disk: ArrayRecord shards with a manifest, written crash-safely.

A folder holds `shard-00000.array_record`, `shard-00001.array_record`, ... and
`manifest.json`. A shard appears under its name only once it is whole, and counts only
once the manifest lists it, so a killed writer loses at most the shard it was filling.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, overload

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mil_jax import disk
from mil_jax.config import from_config_dict
from mil_jax.data.types import Example, Pair
from mil_jax.errors import UserError

Kind = Literal["example", "pair"]
Record = Example | Pair

VERSION = 1
MANIFEST = "manifest.json"
_HEADER = struct.Struct("<BB")  # version, number of examples (1, or 2 for a pair)
_LENGTH = struct.Struct("<I")


def serialize(record: Record) -> bytes:
    """Returns a record as bytes.

    Layout, little endian: version u8, examples u8, then per example its length u32, its
    tokens int32 and its loss mask, 8 positions per byte, the first in the lowest bit.
    """
    examples = (record,) if isinstance(record, Example) else tuple(record)
    parts = [_HEADER.pack(VERSION, len(examples))]
    for tokens, loss_mask in examples:
        if tokens.ndim != 1 or tokens.shape != loss_mask.shape:
            raise ValueError(
                f"tokens {tokens.shape} and loss_mask {loss_mask.shape} must be [L]"
            )
        parts.append(_LENGTH.pack(len(tokens)))
        parts.append(tokens.astype("<i4").tobytes())
        parts.append(np.packbits(loss_mask, bitorder="little").tobytes())
    return b"".join(parts)


def deserialize(data: bytes) -> Record:
    """Returns the record that `serialize` wrote."""
    version, count = _HEADER.unpack_from(data)
    if version != VERSION:
        raise UserError(
            f"a record has format version {version}, this program reads {VERSION}; "
            "write the records again"
        )
    offset, examples = _HEADER.size, []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += _LENGTH.size
        tokens = np.frombuffer(data, "<i4", length, offset).astype(np.int32)
        offset += 4 * length
        packed = np.frombuffer(data, np.uint8, (length + 7) // 8, offset)
        offset += packed.size
        mask = np.unpackbits(packed, count=length, bitorder="little").astype(bool)
        examples.append(Example(tokens, mask))
    return examples[0] if count == 1 else Pair(*examples)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of records holds.

    Attributes:
        kind: "example" or "pair".
        fingerprint: Names everything that the records depend on.
        counts: Records per finished shard.
        complete: Whether the writer reached its end.
        version: Format of the manifest and the records.
        inputs: Files that the records were made from, each with its content's digest.
    """

    kind: Kind
    fingerprint: str
    counts: tuple[int, ...] = ()
    complete: bool = False
    version: int = VERSION
    inputs: tuple[tuple[str, ...], ...] = ()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Returns the manifest of a folder of records.

    Raises:
        UserError: There is none, or it is damaged or of another version.
    """
    path = Path(directory) / MANIFEST
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        what = (
            "is not a folder of records" if path.parent.is_dir() else "does not exist"
        )
        raise UserError(f"{path.parent} {what}; write the records first") from error
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); write the records again"
        ) from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise UserError(
            f"{path} does not have format version {VERSION}; write the records again"
        )
    return from_config_dict(Manifest, values, path=str(path))


def holds_records(directory: str | os.PathLike[str]) -> bool:
    """Returns whether a folder has finished shards, or is complete without any."""
    path = Path(directory)
    if not (path / MANIFEST).exists():
        return any(path.glob("*.array_record"))
    manifest = read_manifest(path)
    return bool(manifest.counts) or manifest.complete


def shard_path(directory: str | os.PathLike[str], index: int) -> Path:
    """Returns the path of a finished shard."""
    return Path(directory) / f"shard-{index:05d}.array_record"


class RecordWriter:
    """Writes records so that a killed run can go on where its shards end.

    with RecordWriter(directory, fingerprint=..., kind="example") as writer:
        for i in range(writer.num_written, total):
            writer.write(make_example(i))

    Leaving the block without an error completes the folder; an error or a kill leaves
    it incomplete with the finished shards. Only one process may write to a folder.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        fingerprint: str,
        kind: Kind = "example",
        shard_size: int = 1024,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Opens a new folder or one that an earlier writer left.

        Args:
            directory: Created if missing.
            fingerprint: Names everything the records depend on (source, tokenizer,
                model, sampling settings); records of two fingerprints never mix.
            kind: Whether records are examples or pairs.
            shard_size: Records per shard, at most that many are lost in a crash.
            inputs: Files that the records are made from, with their contents' digests.

        Raises:
            UserError: The folder belongs to another fingerprint, kind or content, holds other
                files, or cannot be written to.
        """
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}; it must be at least 1")
        self._directory = Path(directory)
        self._shard_size = shard_size
        self._writer: ArrayRecordWriter | None = None
        self._manifest: Manifest | None = None
        self._pending = 0
        with disk.writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        new = Manifest(kind, fingerprint, inputs=tuple((inputs or {}).items()))
        has_manifest = (self._directory / MANIFEST).exists()
        if has_manifest and not holds_records(self._directory):
            # A writer that failed at its first record leaves the folder to anyone.
            self._save(new)
            self._temporary.unlink(missing_ok=True)
        elif has_manifest:
            self._manifest = read_manifest(self._directory)
            self._check_same(new)
            self._temporary.unlink(missing_ok=True)
        elif leftover := [p.name for p in self._directory.glob("*.array_record")]:
            raise UserError(
                f"{self._directory} holds {leftover[0]} but no {MANIFEST}; "
                "choose an empty folder"
            )
        else:
            self._save(new)

    def _check_same(self, new: Manifest) -> None:
        old = self._manifest
        if (old.fingerprint, old.kind) != (new.fingerprint, new.kind):
            raise UserError(
                f"{self._directory} holds records of another run (kind {old.kind}, "
                f"fingerprint {old.fingerprint}; this run: {new.kind}, "
                f"{new.fingerprint}); choose another folder or delete this one"
            )
        before, now = dict(old.inputs), dict(new.inputs)
        for name in sorted(before.keys() | now.keys() if before else ()):
            if before.get(name) != now.get(name):
                what = "has changed" if name in before else "is new"
                raise UserError(
                    f"{name} {what if name in now else 'is gone'} since "
                    f"{self._directory} was made of it; put the data back as it was, or "
                    f"delete {self._directory.parent} to start over"
                )
        for i in range(len(old.counts)):
            if not shard_path(self._directory, i).exists():
                raise UserError(
                    f"{shard_path(self._directory, i)} is missing; delete the folder "
                    "and write the records again"
                )

    @property
    def num_written(self) -> int:
        """Records that are safe on disk: the index at which the caller goes on."""
        return sum(self._manifest.counts) if self._manifest else 0

    @property
    def is_complete(self) -> bool:
        """Whether the folder was completed, by this or an earlier writer."""
        return self._manifest.complete

    @property
    def _temporary(self) -> Path:
        return self._directory / "shard.tmp"

    def write(self, record: Record) -> None:
        """Appends a record; it is safe on disk once its shard is full or at `flush`."""
        if self._manifest.complete:
            raise UserError(
                f"{self._directory} is complete; nothing can be added to it"
            )
        kind = "example" if isinstance(record, Example) else "pair"
        if kind != self._manifest.kind:
            raise ValueError(f"got a record of kind {kind}, not {self._manifest.kind}")
        with self._writing():
            if self._writer is None:
                self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
            self._writer.write(serialize(record))
        self._pending += 1
        if self._pending == self._shard_size:
            self.flush()

    def flush(self) -> None:
        """Ends the current shard early, so that all records so far are safe on disk."""
        if self._writer is None:
            return
        counts = (*self._manifest.counts, self._pending)
        with self._writing():
            self._writer.close()  # Some of a failed write is told here only.
            self._writer = None
            disk.sync(self._temporary)
            os.replace(self._temporary, shard_path(self._directory, len(counts) - 1))
        self._save(dataclasses.replace(self._manifest, counts=counts))
        self._pending = 0

    def finish(self) -> None:
        """Writes the last shard and marks the folder as complete."""
        self.flush()
        if not self._manifest.complete:
            self._save(dataclasses.replace(self._manifest, complete=True))

    def _save(self, manifest: Manifest) -> None:
        temporary = self._directory / f"{MANIFEST}.tmp"
        text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
        with self._writing():
            temporary.write_text(text, "utf-8")
            disk.sync(temporary)
            os.replace(temporary, self._directory / MANIFEST)
            disk.sync(self._directory)
        self._manifest = manifest

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        kept = f"the same command then goes on after record {self.num_written}"
        return disk.writing(self._directory, kept)

    def __enter__(self) -> "RecordWriter":
        """Returns the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Completes the folder, or after an error drops the unfinished shard."""
        if kind is None:
            self.finish()
        elif self._writer is not None:
            with contextlib.suppress(RuntimeError):  # The error that brought us here.
                self._writer.close()
            self._writer = None
            self._pending = 0
            self._temporary.unlink(missing_ok=True)


class RecordSource(Sequence[Record]):
    """Random access to the records of a complete folder."""

    def __init__(
        self, directory: str | os.PathLike[str], *, allow_incomplete: bool = False
    ) -> None:
        """Opens a folder.

        Args:
            directory: Written by `RecordWriter`.
            allow_incomplete: Read the finished shards of a folder still being written.

        Raises:
            UserError: The folder is missing, empty, incomplete or damaged.
        """
        self.manifest = read_manifest(directory)
        counts = self.manifest.counts
        self._length = sum(counts)
        if not self.manifest.complete and not allow_incomplete:
            raise UserError(
                f"{directory} is incomplete ({sum(counts)} records in {len(counts)} "
                "shards); run its writer again, it goes on where it stopped"
            )
        if not sum(counts):
            raise UserError(
                f"{directory} holds no records; check the input of its writer"
            )
        self._paths = paths = [shard_path(directory, i) for i in range(len(counts))]
        for path in paths:
            if not path.exists():
                raise UserError(f"{path} is missing; write the records again")
        try:
            self._source = grain.sources.ArrayRecordDataSource([str(p) for p in paths])
            found = len(self._source)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot read the shards of {directory} ({error}); "
                "write the records again"
            ) from error
        if found != sum(counts):
            raise UserError(
                f"{directory} holds {found} records but its manifest says "
                f"{sum(counts)}; write the records again"
            )

    def digest(self) -> str:
        """Returns a digest of all records, to tell when they were made anew."""
        total = hashlib.sha256()
        for path in self._paths:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of records."""
        return self._length

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index):
        """Returns one record, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return deserialize(self._source[index % len(self)])

    def __iter__(self) -> Iterator[Record]:
        """Yields the records in order."""
        return (self[i] for i in range(len(self)))
