"""Replay of accepted tokens and a run over drafted ones, in one pass over the state."""

from pallas_kernels.multi_step.api import (
    Pending,
    selective_multi_step,
    ssd_multi_step,
)

__all__ = ["Pending", "selective_multi_step", "ssd_multi_step"]
