"""MultiStep of a pure Mamba layer between its first and its last projection."""

from pallas_kernels.mamba_step.api import mamba_step
from pallas_kernels.mamba_step.arrays import Cache, Weights

__all__ = ["Cache", "Weights", "mamba_step"]
