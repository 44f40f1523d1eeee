"""Named shapes of the causal convolution, for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size."""

    batch: int
    length: int
    channels: int
    width: int
    segments: int = 1


# Small enough for tests on a CPU.
SMALL = {
    "one_token": Shape(2, 1, 6, 4),
    "batch_1": Shape(1, 7, 5, 4),
    "one_tap": Shape(2, 7, 5, 1, segments=2),
    "packed": Shape(2, 63, 12, 4, segments=4),
    "long": Shape(1, 500, 3, 3),
}

# For benchmarks and tests on an accelerator.
LARGE = {
    "paper_8b": Shape(8, 2048, 4096, 4),
    "paper_8b_mamba2": Shape(8, 2048, 6144, 4),
    "mamba_2_8b": Shape(8, 2048, 5120, 4),
}
