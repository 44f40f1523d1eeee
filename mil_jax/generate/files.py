"""Prompts of a JSON-lines file, answered into another one that survives a kill."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from mil_jax import disk
from mil_jax.data.row_files import JsonLines, RowError
from mil_jax.errors import UserError
from mil_jax.generate.engine import Engine
from mil_jax.generate.plan import FORMS, Plan, request_of
from mil_jax.progress import progress

logger = logging.getLogger(__name__)

# Lines of a chunk are answered in the order of their lengths and written in their own, so a
# kill costs at most the work of one chunk.
BATCHES_PER_CHUNK = 8
_STEPS = 4  # Widths of prompts per doubling; each is compiled once.
_PASSED_ON = ("id", "prompt", "messages")


class Outcome(NamedTuple):
    """What an output file holds at the end.

    Attributes:
        lines: All its records.
        errors: Those of them without an answer.
        written: Those of them that were not there before.
        engine: That made the answers; None if there were none to make.
    """

    lines: int
    errors: int
    written: int
    engine: Engine | None


def answer_file(
    plan: Plan,
    load: Callable[[Plan], Engine],
    source: Path,
    target: Path,
    *,
    batch_size: int,
) -> Outcome:
    """Answers every line of `source` by a record in `target`, in the same order.

    A line that cannot be answered gives `{"line": n, "error": ...}`. Started again, it goes
    on where it was stopped: lines are put into the same batches as in an undisturbed run.

    Args:
        plan: The model and what to do.
        load: Makes the engine; called only if there is something to answer.
        source: JSON lines, perhaps gzipped.
        target: New, or left behind by the same call.
        batch_size: Prompts answered together; may change between starts.

    Raises:
        UserError: A file cannot be read or written, or `target` is of other options.
    """
    rows = _open_source(source)
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} is the input; choose another --output")
    batch_size = min(batch_size, len(rows))
    with _Records.open(target, _settings(plan, source)) as records:
        if records.count > len(rows):
            raise UserError(f"{target} has more lines than {source}; remove it")
        engine, before = None, records.count
        bar = progress(
            total=len(rows), initial=records.count, desc="generate", unit="prompt"
        )
        size = BATCHES_PER_CHUNK * batch_size
        with bar, _told_on_stop(records, len(rows)):
            while records.count < len(rows):
                # A chunk that was written in part is answered as a whole once more, so that
                # its batches are the same.
                first = records.count - records.count % size
                chunk = range(first, min(first + size, len(rows)))
                made, prompts = _read_chunk(plan, rows, chunk)
                new = made[records.count - first :]
                _report(source, new)
                _advance_bar(bar, chunk, len(chunk) - len(prompts))
                if prompts:
                    engine = engine or load(plan)
                    _answer_chunk(engine, made, prompts, chunk, batch_size, bar)
                records.append(new)
        return Outcome(records.count, records.errors, records.count - before, engine)


@contextlib.contextmanager
def _told_on_stop(records: "_Records", total: int) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        text = "%s holds %d of %d lines; the same command goes on from there"
        logger.warning(text, records.path, records.count, total)
        raise


def _open_source(path: Path) -> JsonLines:
    try:
        rows = JsonLines(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give a file of JSON lines"
        ) from error
    if not len(rows):
        raise UserError(f"{path} holds no lines; give {FORMS} in each")
    return rows


def _read_chunk(
    plan: Plan, rows: JsonLines, chunk: range
) -> tuple[list[dict[str, Any]], dict[int, np.ndarray]]:
    """Returns the beginning of every line's record, or its error, and the prompts."""
    records, prompts = [], {}
    for i in chunk:
        record, prompt = _read(plan, rows, i)
        records.append(record)
        if prompt is not None:
            prompts[i] = prompt
    return records, prompts


def _answer_chunk(
    engine: Engine,
    records: Sequence[dict[str, Any]],
    prompts: Mapping[int, np.ndarray],
    chunk: range,
    batch_size: int,
    bar: tqdm,
) -> None:
    """Adds the answers to the records."""
    order = sorted(prompts, key=lambda i: prompts[i].size)
    for at in range(0, len(order), batch_size):
        members = order[at : at + batch_size]
        # Always a full batch, so that the last one compiles nothing new.
        filled = members + members[:1] * (batch_size - len(members))
        answers = engine.answer(
            [prompts[i] for i in filled],
            filled,
            used=len(members),
            width=padded_width(prompts[members[-1]].size),
        )
        for i, answer in zip(members, answers, strict=True):
            end = {"answer": answer.text, "finish": answer.finish}
            records[i - chunk.start].update(end)
        _advance_bar(bar, chunk, len(members))


def _advance_bar(bar: tqdm, chunk: range, count: int) -> None:
    # Lines that were there already are answered again, but not counted again.
    bar.update(min(count, chunk.stop - bar.n))


def padded_width(length: int) -> int:
    """Returns the width for prompts of some length: few are compiled, few are much wider."""
    step = max(32, (1 << (length - 1).bit_length()) // (2 * _STEPS))
    return -(-length // step) * step


def _read(
    plan: Plan, rows: JsonLines, index: int
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns the beginning of a line's record and its prompt, or its error."""
    echo: dict[str, Any] = {}
    try:
        try:
            row = rows[index]
            echo = {key: row[key] for key in _PASSED_ON if key in row}
            return echo, plan.encode(request_of(row))
        except RecursionError:
            raise RowError("not valid JSON (nested too deeply)") from None
    except UserError as error:
        failed = {"line": rows.line(index), "error": str(error)}
        return ({"id": echo["id"]} if "id" in echo else {}) | failed, None


def _report(source: Path, records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        if "error" in record:
            logger.warning("%s, line %d: %s", source, record["line"], record["error"])


class _Records:
    """The output file and how far it has come."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.count = self.errors = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, settings: Mapping[str, Any]) -> Iterator["_Records"]:
        """Yields the file, ready to go on after its last whole line."""
        with disk.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        if not path.is_file():  # Reading a device might never end.
            raise UserError(f"{path} is not a plain file; choose another --output")
        with contextlib.ExitStack() as stack:
            stack.callback(_close, file)
            if not disk.try_lock(file.fileno()):
                raise UserError(f"another run is writing {path}; wait for it")
            is_begun = os.fstat(file.fileno()).st_size > 0
            _check_settings(path, settings, is_begun)
            records = cls(path, file)
            records._count()
            yield records

    def _count(self) -> None:
        """Counts the records and cuts off what a kill left of the one after them."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            record = _parsed(line) if line.endswith(b"\n") else None
            if record is None:
                if self._file.read(1):
                    raise UserError(
                        f"{self.path}, line {number} is damaged; remove the file to "
                        "start over"
                    )
                self._file.truncate(whole)
                break
            whole += len(line)
            self.count += 1
            self.errors += "error" in record

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records; they are on disk when it returns."""
        data = b"".join(_line(record) for record in records)
        then = f"the same command then goes on after line {self.count}"
        with disk.writing(self.path, then):
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.count += len(records)
        self.errors += sum("error" in record for record in records)


def _close(file: BinaryIO) -> None:
    # All is on disk but what a failed write left in the buffer.
    with contextlib.suppress(OSError):
        file.close()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and ("answer" in record or "error" in record)
    return record if is_record else None


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # An `id` may hold what UTF-8 cannot.
        return json.dumps(record).encode() + b"\n"


def _settings(plan: Plan, source: Path) -> dict[str, Any]:
    """Returns all that answers depend on, as JSON types."""
    options = plan.options
    with source.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return {
        "model": str(plan.folder.resolve()),
        "files of the model": _digest_of_folder(plan.folder),
        "draft": None
        if plan.draft_folder is None
        else str(plan.draft_folder.resolve()),
        "files of the draft": _digest_of_folder(plan.draft_folder),
        "k": None if options.draft is None else options.k,
        "content of the input": content,
        "chat": plan.is_chat,
        "system": options.system,
        "max_new_tokens": options.max_new_tokens,
        "max_length": options.max_length,
        "temperature": options.sampling.temperature,
        "top_k": options.sampling.top_k,
        "top_p": options.sampling.top_p,
        "seed": options.seed,
        "dtype": plan.dtype,
        "stop": list(options.stop),
    }


def _digest_of_folder(folder: Path | None) -> str | None:
    if folder is None:
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_settings(path: Path, settings: Mapping[str, Any], is_begun: bool) -> None:
    """Compares with the settings of an output that is begun, else writes them beside it."""
    beside = path.with_name(path.name + ".options.json")
    if not is_begun:
        partial = beside.with_name(beside.name + ".partial")
        with disk.writing(beside):
            partial.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
            os.replace(partial, beside)
        return
    try:
        before = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path} exists and {beside.name} does not say how it was made; choose "
            "another --output"
        ) from None
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(
                f"{path} holds answers of other options: {key} was {before.get(key)!r}, "
                f"now {value!r}; choose another --output, or remove it to start over"
            )
