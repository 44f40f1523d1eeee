"""Named shapes of the selective scan, for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size; E is not always a multiple of a block, nor L of a chunk."""

    batch: int
    length: int
    d_inner: int
    d_state: int
    B_groups: int
    C_groups: int
    segments: int = 1
    checkpoint_every: int = 64


# Small enough for tests on a CPU.
SMALL = {
    "one_token": Shape(2, 1, 12, 4, 3, 6),
    "batch_1": Shape(1, 7, 10, 4, 5, 10),
    "one_group": Shape(1, 63, 9, 4, 1, 1),
    "gqa_packed": Shape(2, 63, 24, 4, 2, 6, segments=4),
    "long": Shape(1, 500, 8, 4, 2, 4),
    "many_channels": Shape(1, 9, 160, 4, 1, 5),
}

# For benchmarks and tests on an accelerator.
LARGE = {
    "paper_8b": Shape(8, 2048, 4096, 16, 64, 256),
    "paper_8b_every_2": Shape(8, 2048, 4096, 16, 64, 256, checkpoint_every=2),
    "paper_8b_training": Shape(2, 2048, 4096, 16, 64, 256),
    "paper_8b_32k": Shape(1, 32768, 4096, 16, 64, 256),
    "paper_8b_packed": Shape(2, 2048, 4096, 16, 64, 256, segments=5),
    "mamba_2_8b": Shape(8, 2048, 5120, 16, 1, 1),
}
