"""Attention of new tokens to a key/value cache, and the writing of that cache."""

from pallas_kernels.cached_attention.api import cached_attention, rotate_and_append

__all__ = ["cached_attention", "rotate_and_append"]
