"""Unit tests of the loop: order of batches, logs, checkpoints, stops and continuations."""

import csv
import dataclasses
import errno
import gc
import itertools
import json
import os
import pkgutil
import shutil
import signal
import time

import pytest

from mil_jax.checkpoint.orbax_io import RunCheckpoints
from mil_jax.errors import UserError
from mil_jax.train.loop import CHECKPOINTS, METRICS_FILE, read_metrics

from . import toy_run
from .toy_run import assert_same_state, run


def _rows(folder):
    return read_metrics(folder / METRICS_FILE)


def _losses(folder):
    """Steps and losses, as written: equal text is equal bits."""
    with (folder / METRICS_FILE).open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def _saved(folder):
    return sorted(int(p.name) for p in (folder / CHECKPOINTS).iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_device):
    """Ten steps in one go: its folder and last state."""
    folder = tmp_path_factory.mktemp("undisturbed")
    state, _ = run(folder, one_device)
    return folder, state


class TestUndisturbed:
    def test_step_i_has_batch_i_and_one_row(self, undisturbed):
        folder, _ = undisturbed
        rows = _rows(folder)
        assert [row["step"] for row in rows] == list(range(10))
        assert [row["seen"] for row in rows] == list(range(10))
        assert len({row["loss"] for row in rows}) == 10

    def test_speed_counts_all_tokens(self, undisturbed):
        for row in _rows(undisturbed[0]):
            assert row["tok_s"] * row["seconds"] == pytest.approx(6, rel=1e-3)

    def test_the_newest_two_checkpoints_stay(self, undisturbed):
        """Every three steps, and after the last."""
        assert _saved(undisturbed[0]) == [9, 10]

    def test_events_are_written(self, undisturbed):
        assert list((undisturbed[0] / "tensorboard").glob("events*"))

    def test_a_finished_run_does_nothing(self, undisturbed, tmp_path, one_device):
        folder, state = undisturbed
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        again, step_fn = run(copy, one_device)
        assert step_fn.seen == []
        assert (copy / METRICS_FILE).read_text() == (folder / METRICS_FILE).read_text()
        assert_same_state(again, state)


class TestContinued:
    @pytest.mark.parametrize("stop_at", [5, 6, 8])
    def test_killed_run(self, undisturbed, tmp_path, one_device, stop_at):
        """With rows behind the last checkpoint, and right at one."""
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, one_device, stop_at=stop_at)
        kept = 3 * (stop_at // 3)
        assert RunCheckpoints(tmp_path / CHECKPOINTS).latest_step() == kept
        state, step_fn = run(tmp_path, one_device)
        assert step_fn.seen == list(range(kept, 10))
        assert_same_state(state, undisturbed[1])
        assert _losses(tmp_path) == _losses(undisturbed[0])

    def test_killed_before_the_first_checkpoint(
        self, undisturbed, tmp_path, one_device
    ):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, one_device, stop_at=2)
        state, step_fn = run(tmp_path, one_device)
        assert step_fn.seen == list(range(10))
        assert_same_state(state, undisturbed[1])
        assert _losses(tmp_path) == _losses(undisturbed[0])

    def test_row_cut_by_a_kill(self, undisturbed, tmp_path, one_device):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, one_device, stop_at=8)
        file = tmp_path / METRICS_FILE
        file.write_text(file.read_text()[:-9])
        run(tmp_path, one_device)
        assert _losses(tmp_path) == _losses(undisturbed[0])

    def test_kill_while_the_metrics_are_rewritten(
        self, undisturbed, tmp_path, one_device, monkeypatch
    ):
        """The rows before the checkpoint are still there for the next continuation."""
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, one_device, stop_at=8)

        def killed(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("csv.DictWriter.writerow", killed)
            patch.setattr("csv.DictWriter.writerows", killed)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, one_device)
        run(tmp_path, one_device)
        assert _losses(tmp_path) == _losses(undisturbed[0])

    def test_other_data_is_refused(self, undisturbed, tmp_path, one_device):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, one_device, stop_at=8, data="a")
        with pytest.raises(UserError) as error:
            run(tmp_path, one_device, data="b")
        assert str(error.value) == (
            f"{tmp_path}/checkpoints was trained on other records than the stage has now: "
            f"put those back, or delete {tmp_path} to start over"
        )
        assert _saved(tmp_path) == [3, 6]
        state, step_fn = run(tmp_path, one_device, data="a")
        assert step_fn.seen == list(range(6, 10))
        assert_same_state(state, undisturbed[1])

    def test_longer_run_goes_on(self, undisturbed, tmp_path, one_device):
        """The end of a run is no special step."""
        run(tmp_path, one_device, num_steps=5)
        assert _saved(tmp_path) == [3, 5]
        state, step_fn = run(tmp_path, one_device)
        assert step_fn.seen == list(range(5, 10))
        assert_same_state(state, undisturbed[1])


class TestSignals:
    @pytest.fixture(autouse=True)
    def _ctrl_c_interrupts(self):
        """Whatever started pytest, perhaps in the background."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_stops_after_a_checkpoint_and_goes_on(
        self, undisturbed, tmp_path, one_device, capfd, number
    ):
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, one_device, signals={4: [number]})
        said = capfd.readouterr().err
        assert "toy: stopping after this step" in said
        assert ("Ctrl-C once more" in said) == (number == signal.SIGINT)
        assert stop.value.code == (
            "stopped by signal after step 5 of toy; the same command goes on from there"
        )
        assert signal.getsignal(number) is before
        assert _saved(tmp_path) == [3, 5]
        assert [row["step"] for row in _rows(tmp_path)] == list(range(5))
        state, step_fn = run(tmp_path, one_device)
        assert step_fn.seen == list(range(5, 10))
        assert_same_state(state, undisturbed[1])
        assert _losses(tmp_path) == _losses(undisturbed[0])

    def test_ctrl_c_twice_stops_at_once(self, undisturbed, tmp_path, one_device):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, one_device, signals={4: [signal.SIGINT] * 2})
        assert _saved(tmp_path) == [3]
        state, step_fn = run(tmp_path, one_device)
        assert step_fn.seen == list(range(3, 10))
        assert_same_state(state, undisturbed[1])

    def test_ignored_ones_stay_ignored(self, tmp_path, one_device):
        """As under nohup."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _, step_fn = run(tmp_path, one_device, signals={4: [signal.SIGINT] * 2})
        finally:
            signal.signal(signal.SIGINT, before)
        assert step_fn.seen == list(range(10))


def _fail_from(patch, target, times):
    """Lets a function work so many times, after which the disk is full."""
    module, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(module)
    original, calls = getattr(owner, name), itertools.count()

    def function(*args, **kwargs):
        if next(calls) >= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    patch.setattr(owner, name, function)


class TestFullDisk:
    """One line, nothing that was written is lost, and the run goes on with room again."""

    def _goes_on(self, undisturbed, folder, mesh, start):
        state, step_fn = run(folder, mesh)
        assert step_fn.seen == list(range(start, 10))
        assert_same_state(state, undisturbed[1])
        assert _losses(folder) == _losses(undisturbed[0])

    @pytest.mark.parametrize(
        ("target", "times"),
        [
            ("csv.DictWriter.writerow", 8),
            # The file's version, the session's start and five scalars a step.
            ("tensorboardX.event_file_writer:EventsWriter.write_event", 2 + 5 * 7 + 3),
        ],
    )
    def test_log(self, undisturbed, tmp_path, one_device, monkeypatch, target, times):
        with monkeypatch.context() as patch:
            _fail_from(patch, target, times)
            with pytest.raises(UserError) as error:
                run(tmp_path, one_device)
        assert str(error.value) == (
            f"cannot write {tmp_path}/metrics.csv (No space left on device); free some "
            "space, the same command goes on from its checkpoint"
        )
        assert _saved(tmp_path) == [3, 6]
        self._goes_on(undisturbed, tmp_path, one_device, 6)

    @pytest.mark.parametrize("is_waited_for", [True, False])
    def test_checkpoint(
        self, undisturbed, tmp_path, one_device, monkeypatch, is_waited_for
    ):
        """Told at the first step after it has failed, in the background."""
        dumps, save = json.dumps, RunCheckpoints.save

        def full(value, **kwargs):
            if isinstance(value, dict) and value.get("step") == 6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return dumps(value, **kwargs)

        def save_and_wait(self, *args):
            save(self, *args)
            while self._manager.is_saving_in_progress():
                time.sleep(0.01)

        with monkeypatch.context() as patch:
            patch.setattr(json, "dumps", full)
            if is_waited_for:
                patch.setattr(RunCheckpoints, "save", save_and_wait)
            with pytest.raises(UserError) as error:
                run(tmp_path, one_device)
        folder = tmp_path / CHECKPOINTS
        assert str(error.value) == (
            f"cannot write {folder} (No space left on device); free some space, the same "
            "command then goes on after step 3"
        )
        if is_waited_for:
            assert [row["step"] for row in _rows(tmp_path)] == list(range(6))
        self._goes_on(undisturbed, tmp_path, one_device, 3)
        assert _saved(tmp_path) == [9, 10]


class TestNotFinite:
    @pytest.mark.parametrize("name", ["loss", "grad_norm"])
    @pytest.mark.parametrize("step", [6, 7, 8])
    def test_stops_and_keeps_what_was_good(self, tmp_path, one_device, step, name):
        """At 8 a checkpoint is due at once, which must not be written."""
        with pytest.raises(UserError) as error:
            run(tmp_path, one_device, spoil={step: name})
        message = str(error.value)
        assert (
            f"toy: {name} is nan at step {step} (batch {step} of the data)" in message
        )
        assert "optimizer.lr" in message and str(tmp_path) in message
        assert "\n" not in message
        assert _saved(tmp_path) == [3, 6]
        assert [row["step"] for row in _rows(tmp_path)] == list(range(step))

    def test_no_checkpoint_on_a_signal_either(self, tmp_path, one_device):
        with pytest.raises(UserError, match="step 4"):
            run(tmp_path, one_device, spoil={4: "loss"}, signals={4: [signal.SIGTERM]})
        assert _saved(tmp_path) == [3]


def _delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _truncate(path):
    for file in [p for p in path.rglob("*") if p.is_file()] or [path]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, one_device):
    """Stopped after eight steps, with checkpoints of three and six."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        run(folder, one_device, stop_at=8)
    return folder


@pytest.fixture(scope="class")
def drop_unfinished_reads():
    """Orbax leaves those of other arrays behind when one fails."""
    yield
    gc.collect()


@pytest.mark.usefixtures("drop_unfinished_reads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamaged:
    """The newest checkpoint is hurt: one clear line, and never from the start again."""

    @pytest.mark.parametrize(
        ("hurt", "part"),
        [
            (_delete, "state"),
            (_delete, "state/d"),
            (_delete, "state/manifest.ocdbt"),
            (_delete, "position"),
            (_delete, "position/metadata"),
            (_truncate, "state/d"),
            (_delete, "state/ocdbt.process_0"),
            (_truncate, "state/ocdbt.process_0"),
            (_truncate, "state/_METADATA"),
            (_truncate, "position/metadata"),
            (_truncate, "."),
        ],
        ids=lambda value: getattr(value, "__name__", value),
    )
    def test_is_named(self, stopped, tmp_path, one_device, hurt, part):
        folder = tmp_path / "copy"
        shutil.copytree(stopped, folder)
        newest = folder / CHECKPOINTS / "6"
        hurt(newest / part)
        with pytest.raises(UserError) as error:
            run(folder, one_device)
        message = str(error.value)
        assert str(newest) in message and "delete it" in message
        assert "\n" not in message and len(message) < 600
        assert _saved(folder) == [3, 6]

    def test_the_remedy_in_the_message_works(
        self, undisturbed, stopped, tmp_path, one_device
    ):
        folder = tmp_path / "copy"
        shutil.copytree(stopped, folder)
        shutil.rmtree(folder / CHECKPOINTS / "6")
        state, step_fn = run(folder, one_device)
        assert step_fn.seen == list(range(3, 10))
        assert_same_state(state, undisturbed[1])
        assert _losses(folder) == _losses(undisturbed[0])

    def test_emptied_folder(self, stopped, tmp_path, one_device):
        folder = tmp_path / "copy"
        shutil.copytree(stopped, folder)
        for child in (folder / CHECKPOINTS / "6").iterdir():
            _delete(child)
        with pytest.raises(UserError, match="damaged or half-written"):
            run(folder, one_device)

    def test_unfinished_write_is_ignored(
        self, undisturbed, stopped, tmp_path, one_device
    ):
        """What a kill in the middle of a write leaves has another name."""
        folder = tmp_path / "copy"
        shutil.copytree(stopped, folder)
        checkpoints = folder / CHECKPOINTS
        half = checkpoints / "7.orbax-checkpoint-tmp"
        shutil.copytree(checkpoints / "6", half)
        _delete(half / "state" / "manifest.ocdbt")
        shutil.copytree(half, checkpoints / "70.orbax-checkpoint-tmp")
        state, step_fn = run(folder, one_device)
        assert _saved(folder) == [9, 10]
        assert step_fn.seen == list(range(6, 10))
        assert_same_state(state, undisturbed[1])

    def test_checkpoint_of_another_model(
        self, stopped, tmp_path, one_device, monkeypatch
    ):
        """Shapes that disagree are an error, not a model of padded or cut weights."""
        folder = tmp_path / "copy"
        shutil.copytree(stopped, folder)
        config = dataclasses.replace(toy_run.CONFIG, d_model=40)
        monkeypatch.setattr(toy_run, "CONFIG", config)
        with pytest.raises(UserError, match="cannot be read"):
            run(folder, one_device)
