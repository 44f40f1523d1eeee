"""Named shapes of the SSD scan, for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size."""

    batch: int
    length: int
    kv_heads: int
    heads: int
    head_dim: int
    d_state: int
    segments: int = 1


# Small enough for tests on a CPU.
SMALL = {
    "one_token": Shape(2, 1, 2, 4, 3, 5),
    "batch_1": Shape(1, 7, 3, 3, 4, 4),
    "one_group": Shape(1, 63, 1, 3, 5, 4),
    "gqa_packed": Shape(2, 63, 2, 6, 5, 4, segments=4),
    "long": Shape(1, 500, 2, 4, 4, 20),
}

# For benchmarks and tests on an accelerator.
LARGE = {
    "paper_8b": Shape(8, 2048, 8, 32, 128, 128),
    "paper_8b_training": Shape(2, 2048, 8, 32, 128, 128),
    "paper_8b_32k": Shape(1, 32768, 8, 32, 128, 128),
    "paper_8b_packed": Shape(2, 2048, 8, 32, 128, 128, segments=5),
}
