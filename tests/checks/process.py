"""Python programs that a test starts, watches and kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]


def environment(cache, **changes):
    """Returns one CPU device, and compiled programs shared through the folder `cache`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **changes,
    }


def start(args, env):
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        env=env,
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(args, env, timeout=240):
    """Runs a program to its end; returns (exit status, stdout, stderr)."""
    process = start(args, env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def stop_when(args, env, is_due, by=signal.SIGKILL, timeout=240):
    """Signals a program as soon as `is_due()`; returns (exit status, stderr)."""
    process = start(args, env)
    deadline = time.monotonic() + timeout
    try:
        while not is_due():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"too late to stop it: {process.communicate()[1]}")
            time.sleep(0.005)
        process.send_signal(by)
        _, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, err
