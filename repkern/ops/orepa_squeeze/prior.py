"""The frequency prior filters of OREPA (paper supplement, Table 1)."""

from __future__ import annotations

import math

import torch

__all__ = ["dct_filter"]


def dct_filter(
    out_channels: int,
    kernel_size: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """[Co, K, K]: rows of cosines along h for channels below floor(Co/2), along w for the rest.

    filter[c, h, w] = cos((c + 1)(h + 0.5) pi / K) for c < floor(Co/2), else cos((c - floor(Co/2) + 1)(w + 0.5) pi / K).
    Computed in float64, then rounded to `dtype` (default: torch's default dtype).
    """
    half = out_channels // 2
    channel = torch.arange(out_channels, dtype=torch.float64)
    frequency = torch.where(channel < half, channel, channel - half) + 1
    position = torch.arange(kernel_size, dtype=torch.float64) + 0.5
    wave = torch.cos(frequency[:, None] * position * (math.pi / kernel_size))
    along_h = wave[:, :, None].expand(-1, -1, kernel_size)
    along_w = wave[:, None, :].expand(-1, kernel_size, -1)
    filters = torch.where((channel < half)[:, None, None], along_h, along_w)
    return filters.to(dtype=dtype or torch.get_default_dtype(), device=device)
