"""Seeds, the state of every random number generator, and deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch

__all__ = ["deterministic", "random_state", "restore_random_state", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed torch on every device, numpy and Python's `random`. `seed` must be in [0, 2**32)."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 the global generator is the one libraries draw from
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of those generators, in types that `torch.load(weights_only=True)` reads."""
    keys: Any
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)  # noqa: NPY002
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(words, dtype=torch.int64), next_gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`. GPU states are restored on as many GPUs as both machines have."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    name, keys, position, has_gauss, gauss = state["numpy"]
    words = keys.numpy().astype("uint32")
    numpy.random.set_state((name, words, position, has_gauss, gauss))  # noqa: NPY002
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), next_gauss))


@contextlib.contextmanager
def deterministic(threads: int | None = None, *, algorithms: bool = True) -> Iterator[None]:
    """Deterministic algorithms inside the block, on `threads` CPU threads if given; an op that has none raises.

    algorithms: False to set the threads alone.
    cuBLAS is only deterministic with CUBLAS_WORKSPACE_CONFIG, which is set when it is not yet and stays set.
    """
    if algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    )
    if algorithms:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    # Filling every fresh tensor guards against reads of unwritten memory; our tests do that, users need not pay.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = before[3]
        torch.set_num_threads(before[4])
