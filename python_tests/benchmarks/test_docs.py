"""The generated documents: reproducible, current, and honest about what never ran."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repkern.bench import results
from repkern.bench.results import Row

ROOT = Path(__file__).resolve().parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_docs, record_tests = script("make_docs"), script("record_tests")
OPS_ROW = Row(
    kind="ops", op="orepa_squeeze", case="c256", what="forward+backward", dtype="float32", device="cpu", mode="eager",
    backend="cpu", ms_p20=1.9, ms=2.0, ms_p80=2.1, pairs=3,
)  # fmt: skip
BLOCKS_ROWS = (
    dataclasses.replace(
        OPS_ROW, op="train_step", kind="blocks", case="repvgg", what="step", mode="channels_last",
        backend="repvgg recompute/auto", baseline="plain", baseline_ms=2.5, ratio_p20=0.7, ratio=0.8, ratio_p80=0.9,
        target="<= 1.05 x plain", verdict="ok",
    ),
    dataclasses.replace(
        OPS_ROW, op="train_step", kind="blocks-memory", case="repvgg", what="activations", mode="channels_last",
        backend="repvgg recompute/auto", baseline="plain", ms=None, ratio=0.66, extra_mib=66.0, limit_mib=100.0,
        target="<= 0.75 x plain", verdict="ok",
    ),
)  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    """A results folder with one ops comparison measured twice, one training step and one memory row."""
    path = tmp_path / "machine.csv"
    env = results.environment()
    own = dataclasses.replace(
        OPS_ROW, gflops=100.0, gbytes_per_s=1.0, peak_percent=50.0, peak_gflops=200.0, peak_source="matmul 4096",
        target=">= 60 % of peak", verdict="short by 16.7 %",
    )  # fmt: skip
    pair = dataclasses.replace(
        OPS_ROW, baseline="eager", baseline_ms=8.0, ratio_p20=3.9, ratio=4.0, ratio_p80=4.1, target=">= 3 x eager",
        verdict="ok",
    )  # fmt: skip
    for row in (
        own,
        pair,
        dataclasses.replace(own, ms=1.0, peak_percent=100.0, verdict="ok"),
        dataclasses.replace(
            pair, op="train_step", kind="train", case="resnet18", what="step", baseline="plain", target=""
        ),
        dataclasses.replace(
            OPS_ROW, op="train_step", kind="memory", what="peak", ms=None, extra_mib=1.5, limit_mib=2.0
        ),
        *BLOCKS_ROWS,
    ):
        results.append_row(path, env, row)
    return tmp_path


def test_committed_documents_are_the_generated_ones():
    for name, text in make_docs.documents(ROOT / "benchmarks" / "results").items():
        assert (ROOT / "docs" / name).read_text() == text, f"{name} is stale: run python benchmarks/make_docs.py"


def test_check_fails_on_a_stale_document_and_passes_after_writing(stored, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "make_docs.py"),
        "--results",
        str(stored),
        "--output",
        str(docs),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    codes = [subprocess.run([*command, *extra], env=environment, capture_output=True).returncode
             for extra in (["--check"], [], ["--check"])]  # fmt: skip
    assert codes == [1, 0, 0]


def test_the_newest_row_of_a_comparison_is_shown(stored):
    text = make_docs.documents(stored)["performance.md"]
    assert "1 ms | 100 (100 %) | 4.00 (3.90–4.10)" in text
    assert "2 ms | 100 (50 %)" not in text
    assert "| c256 | forward+backward | cpu | >= 60 % of peak | 100.0 % | ok |" in text
    assert "| 1.5 MiB |" in text
    assert "matmul 4096" in text


def test_blocks_have_one_line_for_time_and_memory(stored):
    text = make_docs.documents(stored)["performance.md"]
    figures = "2 ms | 2.5 ms | 0.80 (0.70–0.90) | 66.0 of 100.0 MiB (0.66) |  |"
    assert f"| repvgg | channels_last | repvgg recompute/auto | {figures}" in text
    assert "| repvgg | activations | repvgg recompute/auto, channels_last | <= 0.75 x plain | 0.66 | ok |" in text
    assert text.count("| repvgg | step |") == 1


def test_nothing_is_claimed_for_a_gpu_that_no_row_is_from(stored):
    documents = make_docs.documents(stored)
    assert "not yet run on a GPU" in documents["performance.md"]
    lines = [line for line in documents["backends.md"].splitlines() if line.startswith(("| `cuda`", "| `triton`"))]
    assert [line.count("not yet run on a GPU") for line in lines] == [2, 2, 0]


def test_empty_results_give_documents():
    documents = make_docs.documents(ROOT / "no_such_folder")
    assert "not yet run on a GPU" in documents["performance.md"]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("test_x[f32-cpu-avx512-orepa-c8]", ("cpu", "cpu")),
        ("test_x[f32-triton-cuda-sample]", ("triton", "cuda")),
        ("test_x[f32-simt-cpu-sample]", ("simt", "cpu")),
        ("test_x[cuda-sample]", ("cuda", "cuda")),
        ("test_x[sample]", None),
        ("test_x", None),
    ],
)
def test_a_test_belongs_to_the_backend_it_names(name, target):
    assert record_tests.target_of(name) == target


def test_junit_counts(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase name="test_a[cpu-avx2-x]"/>'
        '<testcase name="test_b[cpu-scalar-x]"><failure/></testcase>'
        '<testcase name="test_c[simt-cpu-x]"><skipped/></testcase><testcase name="test_d"/></testsuite></testsuites>'
    )
    counts = record_tests.count(junit)
    assert counts[("cpu", "cpu")] == {"passed": 1, "failed": 1}
    assert counts[("simt", "cpu")] == {"skipped": 1}
    assert len(counts) == 2


def inference_rows():
    conv = dataclasses.replace(
        OPS_ROW, kind="conv", op="conv3x3", case="c64_56_n1", what="best: F4 nchw", baseline="torch nchw", ms=0.25,
        baseline_ms=0.5, ratio_p20=1.9, ratio=2.0, ratio_p80=2.1,
    )  # fmt: skip
    infer = dataclasses.replace(
        conv, kind="infer", op="optimize_for_inference", case="repvgg_a0_n1_224", what="forward", backend="repkern",
        baseline="ncnn", ms=5.0, baseline_ms=9.0, ratio=1.8,
    )  # fmt: skip
    accuracy = dataclasses.replace(
        OPS_ROW, kind="accuracy", case="repvgg_a0_224", what="logits", backend="repkern", baseline="float64",
        pairs=1000, error_over_bound=0.4, target="<= 1e-05 relative error of logits", verdict="ok",
    )  # fmt: skip
    return [
        dataclasses.replace(conv, what="F4 nchw", ratio=9.9),
        dataclasses.replace(conv, ratio=1.1),
        conv,
        dataclasses.replace(conv, baseline="ncnn", ratio=1.3),
        dataclasses.replace(conv, what="dispatched: torch nchw", ratio=1.0),
        dataclasses.replace(conv, mode="cold weights", what="best: F2 nchw", ratio=1.75),
        dataclasses.replace(
            conv, kind="conv-median", case="18 layers", what="best, median", baseline="torch",
            target=">= 2.2 x torch", verdict="short by 9.1 %",
        ),
        infer,
        dataclasses.replace(infer, baseline="eager", baseline_ms=12.0, ratio=2.4),
        dataclasses.replace(
            infer, what="forward, best rival", baseline="eager", target=">= 1.7 x best rival", verdict="old"
        ),
        dataclasses.replace(infer, what="forward, best rival", target=">= 1.7 x best rival", verdict="ok"),
        dataclasses.replace(infer, kind="infer-memory", what="peak", extra_mib=80.0, limit_mib=60.0, ratio=1.333),
        accuracy,
        dataclasses.replace(accuracy, what="worst image", error_over_bound=0.9, target="", verdict=""),
        dataclasses.replace(accuracy, what="top-1", ratio=100.0, error_over_bound=None, target=">= 100 % of classes"),
    ]  # fmt: skip


def test_tables_of_layers_networks_and_their_accuracy(tmp_path):
    env = results.environment()
    for row in inference_rows():
        results.append_row(tmp_path / "machine.csv", env, row)
    text = make_docs.documents(tmp_path)["performance.md"]
    assert "| c64_56_n1 | float32 | F4 nchw | 0.25 ms | 0.5 ms | 2.00 (1.90–2.10) | 1.30 | 1.00 | 1.75 |  |" in text
    assert "| case | dtype | repkern | ncnn | eager | memory |" in text
    assert "| repvgg_a0_n1_224 | float32 | 5 ms | 9 ms, 1.80 | 12 ms, 2.40 | 80.0 of 60.0 MiB (1.33) |" in text
    assert "| repvgg_a0_224 | repkern | 1000 | 4.0e-06 | 9.0e-06 | 100 % |" in text
    assert "| 18 layers | best, median | cpu | >= 2.2 x torch | 2.00 | short by 9.1 % |" in text
    assert "| repvgg_a0_n1_224 | forward, best rival | repkern | >= 1.7 x best rival | 1.80 | ok |" in text
    assert "| old |" not in text  # another rival was the best one then
    assert "9.9" not in text
