"""Records of training and ablations: every row names its own commit and date."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels import recording

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def record(path: Path, row: Mapping[str, Any], key: tuple[str, ...]) -> None:
    """Adds `row` to the file's rows, in place of one with equal values at `key`."""
    header = recording.describe_run(PACKAGES)
    row = {**row, "commit": header["commit"], "date": header["date"]}
    recording.record(path, header, [row], key)
