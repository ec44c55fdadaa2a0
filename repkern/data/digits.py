"""scikit-learn's digits: 1,797 scanned 8x8 digits that come with the library."""

from __future__ import annotations

import torch

from repkern.data.errors import MissingExtraError
from repkern.data.sets import MemoryData

__all__ = ["open_digits"]

# The split is part of the task, not of a run: every seed is tested on the same images.
_SPLIT_SEED = 2022
_TEST_PART = 5  # one image in five


def open_digits() -> tuple[MemoryData, MemoryData]:
    """The digits [N, 1, 8, 8], always split the same way: 1,442 images to train on and 355 to test on.

    Every class is split in proportion. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits
    (UCI), as scikit-learn ships it. Raises MissingExtraError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError(f"the digits need scikit-learn ({error}): pip install 'repkern[quickstart]'") from None
    raw = load()
    labels = torch.from_numpy(raw.target).long()
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = torch.nonzero(labels == digit).flatten()
        chosen = torch.randperm(len(members), generator=generator)[: len(members) // _TEST_PART]
        is_test[members[chosen]] = True
    whole = MemoryData(torch.from_numpy(raw.images).to(torch.uint8).unsqueeze(1), labels, top=16)  # stored as 0..16
    return whole.take(torch.nonzero(~is_test).flatten()), whole.take(torch.nonzero(is_test).flatten())
