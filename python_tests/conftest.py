"""What holds for every test: NaN in fresh memory, guard bytes around native outputs, no TF32, warnings are errors."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Must be set before triton is imported for the first time.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import repkern
from repkern import _native
from repkern.ops import _check

GUARD = 64  # elements on either side
_GUARD_BYTE = 0xA5


def pytest_configure(config):
    config.addinivalue_line("markers", "unguarded: outputs without guard bytes, so that their storage offset is 0")
    if os.environ.get("REPKERN_EXPECT_SANITIZED"):
        for backend in ("cpu", "simt"):
            assert _native.load(backend).build_info()["sanitized"], f"the {backend} kernels are not the sanitized ones"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """torch.empty gives NaN, so an output element that a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _guarded_outputs(request, monkeypatch):
    """Every buffer that native code writes to sits between guard bytes, checked when the test ends."""
    if request.node.get_closest_marker("unguarded"):
        yield
        return
    buffers = []

    def guarded(shape, dtype, device, memory_format=torch.contiguous_format):
        like = torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=memory_format)
        count = like.numel()
        size = dtype.itemsize
        raw = torch.full(((count + 2 * GUARD) * size,), _GUARD_BYTE, dtype=torch.uint8, device=device)
        raw[GUARD * size : (GUARD + count) * size] = 0xFF  # NaN in every floating dtype
        buffers.append((raw, GUARD * size, (GUARD + count) * size))
        return raw.view(dtype).as_strided(like.shape, like.stride(), GUARD)

    monkeypatch.setattr(_check, "empty", guarded)
    monkeypatch.setattr(_check, "empty_like", lambda tensor: guarded(tensor.shape, tensor.dtype, tensor.device))
    monkeypatch.setattr(_check, "KEPT_WORKSPACE_BYTES", 0)
    yield
    for raw, begin, end in buffers:
        assert bool((raw[:begin] == _GUARD_BYTE).all()), "a native kernel wrote before its output"
        assert bool((raw[end:] == _GUARD_BYTE).all()), "a native kernel wrote past its output"


@pytest.fixture
def run_python(tmp_path):
    """A fresh interpreter, outside the repository, whose sources would hide the package under test."""

    def run(*arguments, timeout=120, **environment):
        paths = [str(Path(repkern.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_process_is_left():
    """After the test, none of the processes that it started is alive."""
    before = set(multiprocessing.active_children())
    yield
    left = [process for process in multiprocessing.active_children() if process not in before]
    for process in left:
        process.kill()
    assert not left
