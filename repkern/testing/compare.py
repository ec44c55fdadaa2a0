"""Comparison that says what went wrong: worst element, both values, the bound, how many are off."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_close", "worst_ratio"]


def worst_ratio(actual: Tensor, expected: Tensor, bound: Tensor | float) -> tuple[float, tuple[int, ...]]:
    """The largest |actual - expected| / bound and its index; NaN on one side only counts as infinite."""
    got, wanted = actual.detach().double().cpu(), expected.detach().double().cpu()
    limit = torch.as_tensor(bound, dtype=torch.float64).expand_as(wanted)
    difference = (got - wanted).abs()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    ratio = torch.where(same, torch.zeros_like(difference), difference / limit).nan_to_num(nan=torch.inf)
    if ratio.numel() == 0:
        return 0.0, ()
    at = int(ratio.argmax())
    return float(ratio.flatten()[at]), tuple(int(i) for i in torch.unravel_index(torch.tensor(at), ratio.shape))


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str = "result") -> None:
    """AssertionError unless |actual - expected| <= bound everywhere. `bound`: a number or a tensor like `expected`."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    ratio, index = worst_ratio(actual, expected, bound)
    if ratio <= 1:
        return
    limit = torch.as_tensor(bound, dtype=torch.float64).expand(expected.shape)
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs()
    over = float((~(difference <= limit)).double().mean()) * 100
    raise AssertionError(
        f"{what}: worst at {index}: got {actual[index].item():.9g}, expected {expected[index].item():.9g}, "
        f"difference {difference[index].item():.3g}, bound {limit[index].item():.3g} ({ratio:.3g}x); "
        f"{over:.3g} % of {expected.numel()} elements are over"
    )
