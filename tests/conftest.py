"""Shared by all tests: eight CPU devices, strict promotion, comparison."""

import importlib.metadata
import logging
import os

# Before JAX starts. Compiling dominates these tests and their models are tiny, so the CPU
# backend does not optimise.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Compiles in a third of the time; later versions refuse the flag.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# `MIL_JAX_TESTS=gpu pytest -m gpu` runs on the accelerator, optimised.
if os.environ.get("MIL_JAX_TESTS") != "gpu":
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), *_FLAGS]
    ).strip()
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("checks")


@pytest.fixture
def strict_jax():
    """No silent promotion of dtypes or ranks (optax does both, so not everywhere)."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def own_logging():
    """Commands set up the process's logging: no test inherits it from another one.

    Not even from a fixture that ran before this one: loggers start as Python makes them.
    """
    _reset_loggers()
    yield
    _reset_loggers()


def _reset_loggers():
    for name in ("mil_jax", "pallas_kernels"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
