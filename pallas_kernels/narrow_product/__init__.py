"""Product of a few tokens with a weight matrix, norm before and residual after it."""

from pallas_kernels.narrow_product.api import is_kept_by_output, narrow_product

__all__ = ["is_kept_by_output", "narrow_product"]
