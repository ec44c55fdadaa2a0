"""Backend choice: forced, automatic, logged once, and the environment variables."""

import logging
import os

import pytest
import torch

import repkern
from repkern.ops import _select, compose_sequential


def test_available_backends_gives_a_reason_for_each_absent_one():
    backends = repkern.available_backends()
    assert set(backends) == set(_select.BACKENDS)
    assert backends["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in backends.values())


def test_forcing_nests_and_is_undone_by_errors():
    with repkern.use_backend("reference"):
        with repkern.use_backend("auto"):
            assert _select.choose("op", "cpu") != "simt"
        assert _select.choose("op", "cpu") == "reference"
        with pytest.raises(KeyError), repkern.use_backend("cuda"):
            raise KeyError
        assert _select.choose("op", "cpu") == "reference"


def test_the_choice_is_logged_once(caplog):
    _select._choose.cache_clear()
    kernel = torch.zeros(1, 1, 1, 1)
    with caplog.at_level(logging.INFO, logger="repkern"):
        compose_sequential(kernel, kernel)
        compose_sequential(kernel, kernel)
    chosen = [record for record in caplog.messages if record.startswith("compose_sequential on cpu: backend")]
    assert len(chosen) == 1


def test_environment_forces_a_backend(run_python):
    result = run_python(
        "-c", "from repkern.ops import _select; print(_select.choose('op', 'cpu'))", REPKERN_BACKEND="reference"
    )
    assert result.stdout.strip() == "reference", result.stderr


def test_unknown_names_in_the_environment_are_refused_by_name(run_python):
    result = run_python("-c", "import repkern", REPKERN_BACKEND="gpu")
    assert result.returncode != 0
    assert "REPKERN_BACKEND" in result.stderr
    assert "'gpu'" in result.stderr


@pytest.mark.skipif(_select.why_not("cpu", "cpu") is not None, reason="no native module")
def test_environment_forces_an_instruction_set(run_python):
    code = "from repkern import _native; print(_native.native_build_info()['isa_used'])"
    assert run_python("-c", code, REPKERN_ISA="scalar").stdout.strip() == "scalar"
    refused = run_python("-c", code, REPKERN_ISA="avx1024")
    assert refused.returncode != 0
    assert "REPKERN_ISA=avx1024" in refused.stderr


@pytest.mark.skipif(_select.why_not("cpu", "cpu") is not None, reason="no native module")
def test_torch_and_the_native_module_share_one_openmp():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    kernel = torch.zeros(4, 4, 1, 1)
    with repkern.use_backend("cpu"):
        compose_sequential(kernel, kernel)
    gnu = {pool["filepath"] for pool in threadpoolctl.threadpool_info() if pool["prefix"] == "libgomp"}
    torch_folder = os.path.dirname(torch.__file__)
    others = ("sklearn", "scikit_learn", "ncnn")  # wheels with a library of their own
    ours = [path for path in gnu if not any(name in path for name in others)]
    assert len(ours) == 1, ours
    assert ours[0].startswith(torch_folder), ours
