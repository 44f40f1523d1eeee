"""The training loop: data in, steps, logs and checkpoints out. The only one."""

import contextlib
import csv
import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from mil_jax import disk, sharding
from mil_jax.checkpoint.orbax_io import RunCheckpoints
from mil_jax.errors import UserError
from mil_jax.models.decoder import Blueprint
from mil_jax.progress import progress
from mil_jax.train import state as state_lib
from mil_jax.train.state import TrainState, Weights
from mil_jax.train.step import TrainStep

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"
CHECKPOINTS = "checkpoints"
# At most so much of the events is lost by a kill.
_FLUSH_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a run of steps needs besides its state.

    Attributes:
        name: For the progress bar and messages.
        folder: Gets metrics.csv, TensorBoard events and checkpoints/.
        blueprint: The trained model's.
        step_fn: From `make_train_step`.
        dataset: Batch i is used by step i, so that position and step are one number.
        num_steps: Where to stop.
        checkpoint_every: Steps between checkpoints; the last step always writes one.
        mesh: Devices.
        data: Digest of what the batches are made of; a checkpoint holds it, so that a run
            does not go on over other data.
    """

    name: str
    folder: Path
    blueprint: Blueprint
    step_fn: TrainStep
    dataset: grain.MapDataset
    num_steps: int
    checkpoint_every: int
    mesh: Mesh
    data: str = ""

    def run(
        self, state: TrainState, frozen: Weights, teacher: Weights | None
    ) -> TrainState:
        """Trains to `num_steps`, from the newest checkpoint if there is one.

        Raises:
            UserError: The loss or a gradient is not finite; names step and batch. Nothing
                after the last finite step is saved. Or a checkpoint could not be written:
                told at the first step after that is known.
            SystemExit: SIGTERM or Ctrl-C came; a checkpoint was written first.
        """
        checkpoints = RunCheckpoints(self.folder / CHECKPOINTS)
        try:
            state, start = self._resume(checkpoints, state)
            with (
                _Logs(self.folder, start) as logs,
                self._progress(start) as bar,
                _Interrupt(self.name) as interrupt,
            ):
                return self._steps(
                    state, frozen, teacher, start, checkpoints, logs, bar, interrupt
                )
        finally:
            checkpoints.close()

    def _steps(
        self,
        state: TrainState,
        frozen: Weights,
        teacher: Weights | None,
        start: int,
        checkpoints: RunCheckpoints,
        logs: "_Logs",
        bar: tqdm,
        interrupt: "_Interrupt",
    ) -> TrainState:
        # Metrics are read one step late, so that the device never waits for the host.
        waiting: tuple[int, Mapping[str, jax.Array], int] | None = None
        last_saved = start
        for step, batch in enumerate(self._batches(start), start):
            checkpoints.check_for_errors()
            size = sum(v.size for name, v in batch.items() if name.endswith("tokens"))
            state, metrics = self.step_fn(state, frozen, teacher, batch)
            if waiting:
                self._report(*waiting, logs, bar)
            waiting = (step, metrics, size)
            done = step + 1
            is_due = done % self.checkpoint_every == 0 or done == self.num_steps
            is_stopped = interrupt.is_stopped(done)
            if is_due or is_stopped:
                self._report(*waiting, logs, bar)
                waiting = None
                on_disk = state_lib.to_disk(self.blueprint, state)
                position = {"step": done, "data": self.data}
                checkpoints.save(done, on_disk, position)
                last_saved = done
            if is_stopped:
                checkpoints.close()
                raise SystemExit(
                    f"stopped by signal after step {last_saved} of {self.name}; the same "
                    "command goes on from there"
                )
        return state

    def _resume(
        self, checkpoints: RunCheckpoints, state: TrainState
    ) -> tuple[TrainState, int]:
        step = checkpoints.latest_step()
        if step is None:
            return state, 0
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
            state_lib.to_disk(self.blueprint, state),
        )
        on_disk, position = checkpoints.restore(step, abstract)
        if position.get("data", self.data) != self.data:
            raise UserError(
                f"{self.folder / CHECKPOINTS} was trained on other records than the stage "
                f"has now: put those back, or delete {self.folder} to start over"
            )
        log.info("%s: continuing after step %d", self.name, step)
        return state_lib.from_disk(self.blueprint, on_disk, state), position["step"]

    def _batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        """Yields batches from step `start` on, read ahead by threads, on the devices."""
        if start >= self.num_steps:
            return
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        for batch in self.dataset[start : self.num_steps].to_iter_dataset(ahead):
            yield {name: self._place(value) for name, value in batch.items()}

    def _place(self, value: np.ndarray) -> jax.Array:
        shape = (value.shape[0] * jax.process_count(), *value.shape[1:])
        placement = sharding.named_sharding(self.mesh, ("batch", "length"), shape)
        return jax.make_array_from_process_local_data(placement, value, shape)

    def _report(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        size: int,
        logs: "_Logs",
        bar: tqdm,
    ) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{self.name}: {name} is {value} at step {step} (batch {step} of the "
                    f"data); checkpoints before it are kept in {self.folder / CHECKPOINTS}"
                    ": lower optimizer.lr or look at that batch"
                )
        rate = logs.write(step, values, size)
        text = f"loss {values['loss']:.4f}, {rate:,.0f} tok/s"
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    def _progress(self, start: int) -> tqdm:
        return progress(
            total=self.num_steps,
            initial=start,
            desc=self.name,
            unit="step",
            disable=jax.process_index() != 0,
        )


class _Logs:
    """Every scalar of every step: metrics.csv and TensorBoard events, by one process.

    Both are written by the caller's thread: tensorboardX's own dies of a full disk, and
    whoever goes on feeding it waits for ever.
    """

    def __init__(self, folder: Path, start: int):
        self._path = folder / METRICS_FILE
        self._start = start
        self._board: EventsWriter | None = None
        self._file: Any = None
        self._writer: csv.DictWriter | None = None
        self._clock = self._flushed = time.perf_counter()
        if jax.process_index() != 0:
            return
        with disk.writing(folder):
            events = folder / "tensorboard"
            events.mkdir(exist_ok=True)
            self._board = EventsWriter(str(events / "events"))
            # Events behind the checkpoint are those of steps that are done again.
            begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add_event(start, session_log=begin)

    def __enter__(self) -> "_Logs":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is still buffered fails once more where a write has failed.
        for file in filter(None, (self._board, self._file)):
            with contextlib.suppress(OSError) if kind else disk.writing(self._path):
                file.close()

    def write(self, step: int, values: Mapping[str, float], tokens: int) -> float:
        """Writes one step; returns its tokens per second, padding included."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        row = {"step": step, **values, "tok_s": tokens / seconds, "seconds": seconds}
        if self._board is None:
            return tokens / seconds
        with disk.writing(self._path, "the same command goes on from its checkpoint"):
            if self._writer is None:
                self._open(list(row))
            self._writer.writerow(row)
            self._file.flush()
            for name, value in row.items():
                if name != "step":
                    self._add_event(step, summary=summary.scalar(name, value))
            if now - self._flushed > _FLUSH_SECONDS:
                self._flushed = now
                self._board.flush()
        return tokens / seconds

    def _add_event(self, step: int, **content: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), step=step, **content)
        self._board.write_event(event)

    def _open(self, columns: list[str]) -> None:
        """Opens the file; rows that a resumed run will write again are dropped."""
        kept = read_metrics(self._path) if self._path.exists() else []
        # Renamed when complete, so that a kill in between loses no row.
        partial = self._path.with_suffix(".partial")
        self._file = partial.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="")
        self._writer.writeheader()
        self._writer.writerows(row for row in kept if row["step"] < self._start)
        self._file.flush()
        partial.replace(self._path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.csv; a last row cut by a kill is dropped."""
    with path.open(newline="") as file:
        rows = []
        for row in csv.DictReader(file):
            try:
                values = {name: float(value) for name, value in row.items()}
            except (TypeError, ValueError):
                break
            rows.append(values | {"step": int(values["step"])})
        return rows


class _Interrupt:
    """Turns SIGTERM (a cluster's preemption) and Ctrl-C into a stop after a checkpoint.

    Several processes must stop after the same step, which JAX's preemption service settles;
    it has its own handler of SIGTERM.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        if jax.process_count() > 1:
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) == signal.SIG_IGN:  # As nohup does.
                continue
            # Not in the main thread: the caller keeps its own handling.
            with contextlib.suppress(ValueError):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_stopped(self, step: int) -> bool:
        """Returns whether to stop after `step`, the same on all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _request(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self._requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
        text = f"\n{self._name}: stopping after this step"
        if signum == signal.SIGINT:
            text += "; Ctrl-C once more stops at once, without a checkpoint"
        # Unbuffered: the signal may have come in the middle of a print.
        os.write(2, f"{text}\n".encode())
