"""The emulated tensor-core products and the half-precision types of the host executor."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="the kernels are built by g++, which is not installed")
@pytest.mark.parametrize("order", ["forward", "reverse", "random1", "random2"])
def test_fragments_and_roundings(tmp_path: Path, order: str) -> None:
    source, program = Path(__file__).with_name("mma.cu"), tmp_path / "mma"
    command = [COMPILER or "g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-x", "c++", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True, capture_output=True, text=True)
    environment = {**os.environ, "REPKERN_SIMT_ORDER": order}
    environment.pop("LD_PRELOAD", None)
    words = subprocess.run([str(program)], check=True, capture_output=True, text=True, env=environment).stdout.split()
    errors = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    # Both operands are rounded: at most 2u + u^2 of every product, u = 2^-11 for TF32 and 2^-8 for bfloat16.
    assert 2.0**-14 < errors["tf32"] < 2 * 2.0**-11 * 1.01
    assert 2.0**-11 < errors["bf16"] < 2 * 2.0**-8 * 1.01
    assert errors["conversions"] == 0
