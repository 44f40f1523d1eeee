"""Named shapes of the gated norm, for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size."""

    batch: int
    length: int
    heads: int
    width: int


# Small enough for tests on a CPU.
SMALL = {
    "one_token": Shape(1, 1, 3, 8),
    "three_heads": Shape(2, 7, 3, 16),
    "many_heads": Shape(1, 5, 32, 4),
    "long": Shape(2, 37, 4, 8),
}

# For benchmarks and tests on an accelerator.
LARGE = {"paper_8b": Shape(8, 2048, 32, 128)}
