"""Records of training, decoding and ablations: rows under the versions that ran."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import recording

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def record(path: Path, row: Mapping[str, Any], key: tuple[str, ...]) -> None:
    """Adds `row` to the file's rows, in place of one with equal values at `key`."""
    recording.record(path, recording.describe_run(PACKAGES), [row], key)
