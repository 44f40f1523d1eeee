"""Which implementation runs, what is said of it, and what is no reason to take another."""

import logging

import pytest

from pallas_kernels import dispatch


def refuses(*args, **kwargs):
    raise dispatch.UnsupportedError("no such device")


def breaks(*args, **kwargs):
    raise ValueError("a slip of the kernel")


def double(x, *, plus=0):
    return 2 * x + plus


def triple(x, *, plus=0):
    return 3 * x + plus


@pytest.fixture(autouse=True)
def nothing_logged_before():
    dispatch._log_once.cache_clear()


def test_the_first_that_runs_is_taken():
    table = {"refuses": refuses, "double": double, "triple": triple}
    assert dispatch.run("op", table, None, 5, plus=1) == 11
    assert dispatch.run("op", table, "triple", 5, plus=1) == 16


def test_what_ran_is_logged_once(caplog):
    table = {"refuses": refuses, "double": double}
    with caplog.at_level(logging.INFO):
        for op in ("op", "op", "other"):
            dispatch.run(op, table, None, 5)
        dispatch.run("op", table, "double", 5)
    reason = "refuses was passed over (no such device)"
    assert [record.getMessage() for record in caplog.records] == [
        f"op: running double; {reason}",
        f"other: running double; {reason}",
        "op: running double",
    ]


def test_a_name_is_that_one_or_an_error():
    table = {"refuses": refuses, "double": double}
    with pytest.raises(NotImplementedError, match="^no such device$"):
        dispatch.run("op", table, "refuses", 5)
    with pytest.raises(
        ValueError, match="^op: implementation 'fast' is not one of refuses, double$"
    ):
        dispatch.run("op", table, "fast", 5)


def test_only_what_does_not_run_here_is_passed_over():
    with pytest.raises(ValueError, match="a slip of the kernel"):
        dispatch.run("op", {"breaks": breaks, "double": double}, None, 5)


def test_nothing_runs():
    with pytest.raises(dispatch.UnsupportedError) as error:
        dispatch.run("op", {"one": refuses, "two": refuses}, None, 5)
    assert str(error.value) == (
        "op: nothing runs here: one was passed over (no such device); "
        "two was passed over (no such device)"
    )
