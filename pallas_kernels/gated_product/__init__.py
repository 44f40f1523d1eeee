"""Norm, first products and gate of a feed-forward layer, for a few tokens."""

from pallas_kernels.gated_product.api import gated_product

__all__ = ["gated_product"]
