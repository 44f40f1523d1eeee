"""Mamba's selective scan."""

from pallas_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
