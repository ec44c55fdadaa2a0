"""The host executor must catch what a GPU would let through: planted.cu holds one kernel and its broken variants."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("planted.cu")
ORDERS = ("forward", "reverse", "random1", "random2")
ASAN_EXIT = 77
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the planted kernels are built by g++, which is not installed")


def _build(folder: Path, *flags: str) -> Path:
    program = folder / "planted"
    command = [COMPILER or "g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *flags]
    command += ["-x", "c++", f"-I{ROOT / 'csrc'}", str(SOURCE), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels without sanitizers."""
    return _build(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    try:
        return _build(
            tmp_path_factory.mktemp("sanitized"), "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"g++ cannot build with sanitizers here: {error.stderr[-200:]}")


def _run(program: Path, mistake: str, order: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "REPKERN_SIMT_ORDER": order, "ASAN_OPTIONS": f"exitcode={ASAN_EXIT}"}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run([str(program), mistake], capture_output=True, text=True, env=environment, timeout=60)


def _line(text: str) -> int:
    return next(n for n, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("order", ORDERS)
def test_a_correct_kernel_passes_under_every_order(plain: Path, sanitized: Path, order: str) -> None:
    for program in (plain, sanitized):
        answer = _run(program, "correct", order)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert answer.stdout == "wrong: 0\n"
        assert answer.stderr == ""


@pytest.mark.parametrize("mistake", ["missing_barrier", "missing_syncwarp", "missing_wait", "unwritten_shared"])
def test_a_race_or_an_unwritten_value_gives_a_wrong_result(plain: Path, mistake: str) -> None:
    codes = [_run(plain, mistake, order).returncode for order in ORDERS]
    assert 1 in codes
    assert set(codes) <= {0, 1}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mistake", ["shared_overrun", "global_overrun"])
def test_an_access_out_of_bounds_is_caught(sanitized: Path, mistake: str, order: str) -> None:
    answer = _run(sanitized, mistake, order)
    assert answer.returncode == ASAN_EXIT
    assert "AddressSanitizer: heap-buffer-overflow" in answer.stderr
    assert "planted.cu" in answer.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        (
            "divergent_barrier",
            ["divergent barrier", "thread (0,0,0)", "first barrier", "thread (64,0,0)", "second barrier"],
        ),
        ("exited_thread", ["thread (40,0,0) returned", "first barrier"]),
        ("exited_lane", ["thread (33,0,0) returned", "thread (32,0,0) waits", "__shfl_xor_sync"]),
        ("misaligned_copy", ["thread (3,0,0) copies 8 bytes", "not aligned"]),
        ("divergent_shuffle", ["diverged", "thread (0,0,0)", "thread (16,0,0)", "__shfl_xor_sync"]),
    ],
)
def test_a_mistake_the_executor_sees_is_reported_with_its_place(
    plain: Path, sanitized: Path, mistake: str, parts: list[str], order: str
) -> None:
    for program in (plain, sanitized):
        answer = _run(program, mistake, order)
        assert answer.returncode == 2, answer.stdout + answer.stderr
        assert "kernel reverse_and_sum, block (0,0,0)" in answer.stdout
        for part in parts:
            wanted = f"planted.cu:{_line(part)}" if part.endswith("barrier") and part[0] in "fs" else part
            assert wanted in answer.stdout, answer.stdout
        assert mistake == "misaligned_copy" or re.search(r"planted\.cu:\d+", answer.stdout)


def test_an_unknown_order_is_an_error(plain: Path) -> None:
    answer = _run(plain, "correct", "sideways")
    assert answer.returncode == 2
    assert "REPKERN_SIMT_ORDER must be forward, reverse, random1 or random2, got 'sideways'" in answer.stdout
