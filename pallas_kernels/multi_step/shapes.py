"""Named shapes of MultiStep, for tests and benchmarks."""

from typing import NamedTuple

from pallas_kernels.selective_scan.shapes import Shape as SelectiveShape
from pallas_kernels.ssd.shapes import Shape as SSDShape


class Shape(NamedTuple):
    """Pending slots, and the mixer's shape with the new tokens as its length."""

    slots: int
    mixer: SelectiveShape | SSDShape


# Small enough for tests on a CPU.
SMALL = {
    "decode": Shape(1, SelectiveShape(1, 1, 10, 4, 5, 10)),
    "no_slots": Shape(0, SelectiveShape(2, 3, 9, 4, 1, 1)),
    "verify": Shape(3, SelectiveShape(2, 4, 24, 4, 2, 6)),
}
SMALL_SSD = {
    "decode": Shape(1, SSDShape(1, 1, 2, 4, 3, 5)),
    "no_slots": Shape(0, SSDShape(2, 3, 1, 3, 4, 4)),
    "verify": Shape(3, SSDShape(2, 4, 2, 6, 5, 4)),
}

# For benchmarks and tests on an accelerator: K drafts and the last accepted token.
LARGE = {
    "mamba_2_8b_k1": Shape(2, SelectiveShape(1, 2, 5120, 16, 1, 1)),
    "mamba_2_8b_k4": Shape(5, SelectiveShape(1, 5, 5120, 16, 1, 1)),
    "mamba_2_8b_k8": Shape(9, SelectiveShape(1, 9, 5120, 16, 1, 1)),
    "paper_8b_k4": Shape(5, SelectiveShape(1, 5, 4096, 16, 64, 256)),
}
LARGE_SSD = {"paper_8b_k4": Shape(5, SSDShape(1, 5, 8, 32, 128, 128))}
