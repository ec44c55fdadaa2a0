"""A sheet of images before and after augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["plot_augmentations"]

_MOST_ROWS, _MOST_COLUMNS = 24, 16


def plot_augmentations(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG with a named row for each batch and a column for each image: originals, and what became of them.

    rows: name -> images [N, C, H, W] floating of one N, C 1 or 3; values are cut off at 0 and 1. ValueError when there
    is nothing to draw, too much, or another shape.
    """
    from matplotlib.figure import Figure

    columns = _columns(rows)
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.1 * len(rows)), dpi=150, layout="constrained")
    panels: Any = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, images.detach().cpu().float().clamp(0, 1), strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, metadata={"Software": "repkern"})


def _columns(rows: Mapping[str, Tensor]) -> int:
    if not 1 <= len(rows) <= _MOST_ROWS:
        raise ValueError(f"1 to {_MOST_ROWS} rows fit into one sheet, got {len(rows)}")
    for name, images in rows.items():
        if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"{name}: images must be [N, 1 or 3, H, W], got shape {list(images.shape)}")
    counts = {name: len(images) for name, images in rows.items()}
    columns = next(iter(counts.values()))
    if set(counts.values()) != {columns} or columns > _MOST_COLUMNS:
        raise ValueError(f"every row must have the same 1 to {_MOST_COLUMNS} images, got {counts}")
    return columns
