"""Named shapes of products of a few tokens, for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size: rows x length tokens, `width` inputs, `outputs`."""

    batch: int
    length: int
    width: int
    outputs: int


# Small enough for tests on a CPU.
SMALL = {
    "one_token": Shape(1, 1, 256, 16),
    "odd": Shape(1, 2, 96, 13),
    "rows": Shape(2, 1, 512, 70),
    "deep": Shape(1, 2, 5120, 5),
}

# Maps of decoding models, for benchmarks and tests on an accelerator.
LARGE = {
    f"{name}_{tokens}": Shape(1, tokens, width, outputs)
    for name, width, outputs in (
        ("mamba_2_8b_in", 2560, 10240),
        ("mamba_2_8b_x", 5120, 192),
        ("mamba_2_8b_out", 5120, 2560),
        ("mamba_130m_in", 768, 3072),
        ("mamba_130m_x", 1536, 80),
        ("mamba_130m_out", 1536, 768),
    )
    for tokens in (1, 2)
}
