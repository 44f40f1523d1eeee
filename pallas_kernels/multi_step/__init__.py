"""Replay of accepted tokens and a run over drafted ones, in one pass over the state."""

from pallas_kernels.multi_step.api import (
    Pending,
    conv_multi_step,
    selective_multi_step,
    ssd_multi_step,
)
from pallas_kernels.multi_step.columns import Columns

__all__ = [
    "Columns",
    "Pending",
    "conv_multi_step",
    "selective_multi_step",
    "ssd_multi_step",
]
