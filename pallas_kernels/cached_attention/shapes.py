"""Named shapes of attention to a cache, for tests and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size; `length` tokens are in the cache before the `tokens` new ones."""

    batch: int
    tokens: int
    slots: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None


# Small enough for tests on a CPU.
SMALL = {
    "one_token": Shape(3, 1, 40, 30, 4, 4, 8),
    "grouped": Shape(3, 5, 70, 60, 8, 2, 16),
    "one_kv_head": Shape(2, 17, 50, 33, 8, 1, 8),
    "window": Shape(3, 5, 90, 80, 4, 1, 16, window=20),
    "chunk": Shape(2, 40, 150, 100, 2, 1, 8),
    "chunk_window": Shape(2, 40, 150, 100, 2, 2, 8, window=30),
}

# For benchmarks and tests on an accelerator: Llama-3-8B.
LARGE = {
    "llama3_8b": Shape(1, 1, 1280, 1200, 32, 8, 128),
    "llama3_8b_k4": Shape(1, 5, 1280, 1200, 32, 8, 128),
    "llama3_8b_32k": Shape(1, 1, 32768, 32000, 32, 8, 128),
    "llama3_8b_batch": Shape(64, 1, 16384, 16300, 32, 8, 128),
    "llama3_8b_chunk": Shape(1, 2048, 32768, 30000, 32, 8, 128),
    "zephyr_7b_k4": Shape(1, 5, 8192, 8000, 32, 8, 128, window=4096),
}
