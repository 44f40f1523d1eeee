"""Gate and norm behind the SSD recurrence."""

from pallas_kernels.gated_norm.api import gated_norm

__all__ = ["gated_norm"]
