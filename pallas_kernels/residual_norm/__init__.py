"""Residual sum and the norm of it."""

from pallas_kernels.residual_norm.api import residual_norm

__all__ = ["residual_norm"]
