"""Named shapes of the residual sum and norm, for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size."""

    batch: int
    length: int
    channels: int


# Small enough for tests on a CPU.
SMALL = {
    "one_token": Shape(1, 1, 8),
    "odd": Shape(2, 7, 5),
    "long": Shape(2, 37, 48),
}

# For benchmarks and tests on an accelerator.
LARGE = {"paper_8b": Shape(8, 2048, 4096)}
