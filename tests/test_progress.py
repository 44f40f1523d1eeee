"""Progress in a log file is lines, in a terminal a bar."""

import io
import sys

import pytest
from tqdm import tqdm

from mil_jax import progress as progress_lib
from mil_jax.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time that tqdm sees, in seconds."""
    now = [0.0]
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_lines_in_a_log_file(monkeypatch, clock):
    """One at the start, one every half minute, one at the end; nothing is redrawn."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress(total=90, desc="distill", unit="step") as bar:
        for step in range(90):
            clock[0] += 1
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
            if step == 45:
                tqdm.write("a message", file=sys.stderr)
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
    lines = log.getvalue().splitlines()
    assert [line.partition(" [")[0] for line in lines] == [
        "distill: 0/90",
        "distill: 30/90",
        "a message",
        "distill: 60/90",
        "distill: 90/90",
    ]
    assert lines[1] == "distill: 30/90 [00:30<01:00,  1.00step/s, loss 29]"
    assert progress_lib.LINE_SECONDS == 30


def test_a_bar_in_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress(range(3), desc="tokenize")) == [0, 1, 2]
    assert "\rtokenize: 100%|" in screen.getvalue()
