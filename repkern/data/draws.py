"""Random numbers by counter: what a sample gets depends on seed, epoch and its number, not on what was drawn before.

The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): ten rounds of
multiplications over a counter of four words and a key of two. It is written here in integers, so that a run gives the
same draws with every version of torch and NumPy, which do not promise that.
"""

from __future__ import annotations

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Draws", "epoch_order"]

_Words = NDArray[numpy.uint64]
_LOW = numpy.uint64(0xFFFFFFFF)
_HALF = numpy.uint64(32)
_MULTIPLIERS = (numpy.uint64(0xD2511F53), numpy.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_ORDER_STREAM = 2**32 - 1  # the one that augmentations must leave alone


class Draws:
    """Uniform numbers for the samples of one batch, each a function of (seed, epoch, sample, stream, place).

    `samples` [N] are numbers of images in the data set, not places in the batch. A stream is one purpose, such as
    "is this image mirrored": two purposes take two streams, whichever they are, and their draws are independent.
    ValueError for a seed outside [0, 2**64) and for an epoch or a sample outside [0, 2**32).
    """

    def __init__(self, seed: int, epoch: int, samples: Tensor) -> None:
        _check_range("seed", seed, 2**64)
        _check_range("epoch", epoch, 2**32)
        numbers = samples.to("cpu", torch.int64).flatten()
        if len(numbers):
            _check_range("samples", int(numbers.min()), 2**32)
            _check_range("samples", int(numbers.max()), 2**32)
        self.seed, self.epoch, self.samples = seed, epoch, numbers
        self._words = numbers.numpy().astype(numpy.uint64)

    def __len__(self) -> int:
        return len(self.samples)

    def uniform(self, stream: int, count: int = 1) -> Tensor:
        """[N, count] float32, multiples of 2**-24 in [0, 1). The first draws of a larger count are those of a smaller.

        ValueError for a stream outside [0, 2**32 - 1) and a count below 1.
        """
        _check_range("stream", stream, _ORDER_STREAM)
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        words = self._blocks(stream, -(-count // 4))[:, :count]
        return torch.from_numpy((words >> numpy.uint64(8)).astype(numpy.float32) * numpy.float32(2**-24))

    def _blocks(self, stream: int, blocks: int) -> _Words:
        """[N, 4 * blocks] words of 32 bits."""
        samples = numpy.repeat(self._words, blocks)
        places = numpy.tile(numpy.arange(blocks, dtype=numpy.uint64), len(self._words))
        streams, epochs = numpy.full_like(samples, stream), numpy.full_like(samples, self.epoch)
        return philox((places, streams, samples, epochs), self.seed).reshape(len(self._words), 4 * blocks)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch takes `count` samples: a permutation [count] int64 of their numbers.

    The samples sorted by a random number of 64 bits each.
    """
    words = Draws(seed, epoch, torch.arange(count))._blocks(_ORDER_STREAM, 1)
    keys = (words[:, 0] << _HALF) | words[:, 1]
    return torch.from_numpy(numpy.argsort(keys, kind="stable").astype(numpy.int64))


def philox(counter: tuple[_Words, _Words, _Words, _Words], key: int) -> _Words:
    """Philox 4x32-10 of four words [N] each and a key of 64 bits: [N, 4] words of 32 bits, held in 64."""
    first, second, third, fourth = counter
    halves = (key & 0xFFFFFFFF, key >> 32)
    for turn in range(_ROUNDS):
        keys = [numpy.uint64((word + turn * step) & 0xFFFFFFFF) for word, step in zip(halves, _WEYL, strict=True)]
        left, right = _MULTIPLIERS[0] * first, _MULTIPLIERS[1] * third
        first, second = (right >> _HALF) ^ second ^ keys[0], right & _LOW
        third, fourth = (left >> _HALF) ^ fourth ^ keys[1], left & _LOW
    return numpy.stack([first, second, third, fourth], axis=1)


def _check_range(name: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise ValueError(f"{name} must be in [0, {end}), got {value}")
