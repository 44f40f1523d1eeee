"""Crash tests: programs killed for real end with the bits of one that was not."""

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
from checks import process

from mil_jax.train.loop import CHECKPOINTS, METRICS_FILE

from . import real_run


def _rows(folder):
    file = folder / METRICS_FILE
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [
            (row["step"], row["loss"], row["grad_norm"])
            for row in csv.DictReader(lines)
        ]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return process.environment(tmp_path_factory.mktemp("compiled"))


def _finish(folder, env):
    code, _, err = process.finish([Path(real_run.__file__), folder], env)
    assert code == 0, err
    with np.load(folder / "weights.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, env):
    folder = tmp_path_factory.mktemp("undisturbed")
    return _finish(folder, env), _rows(folder)


def test_killed_then_preempted(tmp_path, env, undisturbed):
    """SIGKILL between two checkpoints; its continuation gets SIGTERM; then to the end."""
    program = [Path(real_run.__file__), tmp_path]
    first = tmp_path / CHECKPOINTS / str(real_run.CHECKPOINT_EVERY)

    def is_between():
        return first.is_dir() and len(_rows(tmp_path)) >= first_rows

    first_rows = real_run.CHECKPOINT_EVERY + 2
    code, _ = process.stop_when(program, env, is_between)
    assert code == -signal.SIGKILL
    killed_at = len(_rows(tmp_path))
    assert killed_at < real_run.NUM_STEPS

    # The continuation first drops the rows behind its checkpoint.
    code, err = process.stop_when(
        program,
        env,
        lambda: len(_rows(tmp_path)) >= killed_at + 2,
        by=signal.SIGTERM,
    )
    assert code == 1
    saved = max(int(p.name) for p in (tmp_path / CHECKPOINTS).iterdir())
    assert killed_at < saved == len(_rows(tmp_path)) < real_run.NUM_STEPS
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"stopped by signal after step {saved} of real")
    assert "Traceback" not in err
    assert not (tmp_path / "weights.npz").exists()

    weights, rows = undisturbed
    found = _finish(tmp_path, env)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert _rows(tmp_path) == rows
    assert [int(row[0]) for row in rows] == list(range(real_run.NUM_STEPS))


def test_the_loss_falls(undisturbed):
    """The run that the others are compared with is one that learns."""
    losses = [float(row[1]) for row in undisturbed[1]]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
