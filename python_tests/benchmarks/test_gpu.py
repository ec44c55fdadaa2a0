"""The harness on a GPU: events, graphs and the allocator's count of memory."""

import pytest
import torch

from repkern.bench.conv import ConvOptions, run_conv
from repkern.bench.infer import InferOptions, run_infer
from repkern.bench.memory import peak_bytes
from repkern.bench.ops import OpsOptions, default_backends, run_ops
from repkern.bench.registry import conv_cases, parse_cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_cuda_rows(cuda_graph):
    rows = []
    options = OpsOptions(
        backends=default_backends("cuda"), baselines=("eager", "conv2d"), device="cuda", pairs=3,
        min_sample_seconds=1e-3, cuda_graph=cuda_graph, quick=True,
    )  # fmt: skip
    assert run_ops(parse_cases("c16 orepa_squeeze 16,16,3,1"), options, rows.append, lambda text: None) == []
    assert {row.what for row in rows} >= {"forward", "forward+backward"}
    assert all(0 < row.ms_p20 <= row.ms_p80 for row in rows)


def test_cuda_peak_counts_what_lived_before_and_during():
    resident = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    peak = peak_bytes(lambda: torch.empty(2**21, dtype=torch.uint8, device="cuda"), [resident], "cuda")
    assert peak == 3 * 2**20


@pytest.mark.parametrize("how", ["fp32", "tf32", "fp16"])
def test_convolutions_against_cudnn(how):
    rows = []
    options = ConvOptions(backend="auto", device="cuda", how=how, cold=False, choosing_pairs=1, pairs=2)
    run_conv(conv_cases("64,14", (1, 2)), options, rows.append, print)
    assert {row.what.partition(": ")[0] for row in rows} >= {"best", "dispatched"}
    assert all(row.device == "cuda" and row.baseline.startswith("torch") for row in rows)


@pytest.mark.parametrize("how", ["fp32", "tf32", "fp16"])
def test_networks_against_cudnn(how):
    rows = []
    options = InferOptions(
        ["eager", "eager-last"], batches=(2,), size=32, width=0.125, device="cuda", precision=how, pairs=2
    )
    assert run_infer(["repvgg_a0"], options, rows.append, print) == []
    assert [row.baseline for row in rows[:2]] == ["eager", "eager-last"]
