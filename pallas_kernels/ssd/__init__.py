"""Mamba-2's state-space dual (SSD) scan."""

from pallas_kernels.ssd.api import ssd

__all__ = ["ssd"]
