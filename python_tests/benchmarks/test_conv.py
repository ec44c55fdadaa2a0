"""`repkern bench conv`: rows of every method, what they are compared with, and that nothing wrong is timed."""

import dataclasses
import importlib.util
import json
import os

import pytest
import torch
from typer.testing import CliRunner

from repkern.bench import conv, targets
from repkern.bench.conv import COLD, WARM, ConvOptions, run_conv
from repkern.bench.conv_methods import Method, NcnnConv, allowed_error, op_methods, torch_methods
from repkern.bench.registry import conv_cases
from repkern.bench.rivals_ncnn import NcnnNet, convolution_net, write_ncnn

needs_ncnn = pytest.mark.skipif(importlib.util.find_spec("ncnn") is None, reason="needs ncnn")
QUICK = {"choosing_pairs": 1, "pairs": 2, "min_sample_seconds": 0.0, "threads": 1}
CASES = conv_cases("17,9 32,7", (1, 2))


def run(cases=CASES, **changes):
    rows, said = [], []
    assert run_conv(cases, ConvOptions(**(QUICK | {"ncnn": False} | changes)), rows.append, said.append) == []
    return rows, said


@pytest.fixture(scope="module")
def rows():
    return run()[0]


def of(rows, role, mode=WARM):
    return [row for row in rows if row.kind == "conv" and row.mode == mode and row.what.startswith(f"{role}: ")]


def test_every_method_has_a_row_per_layer_warm_and_cold(rows):
    for mode in (WARM, COLD):
        names = {row.what for row in rows if row.kind == "conv" and row.mode == mode and ": " not in row.what}
        assert names >= {"F2 channels_last", "F4 blocks channels_last", "direct fma channels_last"}
        assert names >= {"layer F4 channels_last", "layer direct fma channels_last"}
        assert ("F2 nchw" in names) == (mode == WARM)
        assert not any(name.startswith("torch") for name in names)
        assert [row.case for row in of(rows, "best", mode)] == [case.name for case in CASES]
    for row in rows:
        if row.kind == "conv":
            assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
            assert 0 < row.ratio_p20 <= row.ratio <= row.ratio_p80
            assert row.baseline in ("torch nchw", "torch channels_last")


def test_dispatched_is_the_fastest_of_all_when_chosen(rows):
    for row in of(rows, "dispatched"):
        first = {r.what: r for r in rows if (r.case, r.mode) == (row.case, WARM) and ": " not in r.what}
        chosen = row.what.partition(": ")[2]
        if chosen.startswith("torch"):
            assert chosen == next(iter(first.values())).baseline
        else:
            assert first[chosen].ms_p20 == min(r.ms_p20 for r in first.values())


def test_medians_have_verdicts_only_over_all_layers(rows):
    found = [row for row in rows if row.kind == "conv-median"]
    assert {(row.what, row.mode) for row in found} == {
        (what, mode) for what in ("best, median", "dispatched, slowest") for mode in (WARM, COLD)
    }
    assert not any(row.target for row in found)
    made = [
        dataclasses.replace(row, case="x", ratio=ratio) for row in of(rows, "best")[:1] for ratio in (2.0, 3.0, 5.0)
    ]
    made += [dataclasses.replace(of(rows, "dispatched")[0], ratio=ratio) for ratio in (0.9, 2.0)]
    median, slowest = conv._medians(made, conv_cases(), ConvOptions())
    assert (median.ratio, median.case, median.target) == (3.0, "3 layers", ">= 2.2 x torch") or "avx2" in median.target
    assert (slowest.ratio, slowest.target, slowest.verdict) == (0.9, ">= 1 x torch", "short by 10.0 %")


def test_targets_by_machine():
    assert str(targets.conv_target("cpu", "avx2", "torch")) == ">= 1.5 x torch"
    assert str(targets.conv_target("cpu", "avx512", "ncnn")) == ">= 1.2 x ncnn"
    assert str(targets.conv_target("cuda", "fp16", "torch")) == ">= 0.9 x torch"
    assert targets.conv_target("cpu", "scalar", "torch") is None


def test_cold_weights_are_copies_used_in_turn():
    layer = conv._Layer(conv_cases("16,8", (1,))[0], ConvOptions(**QUICK), None, print)
    assert layer.copies == {WARM: 1, COLD: conv._MOST_COPIES}
    seen = []

    def pack(weight):
        return weight

    method = Method("spy", "ours", 1, pack, lambda x, packed: lambda: seen.append(packed.data_ptr()), ("nchw",))
    (work,) = layer._calls([method], COLD).values()
    for _ in range(layer.copies[COLD] + 1):
        work.run(work.prepare())
    assert len(set(seen)) == layer.copies[COLD]
    assert seen[0] == seen[-1]


@pytest.mark.parametrize("whose", ["ours", "torch"])
def test_a_wrong_result_is_never_timed(monkeypatch, whose):
    def wrong(*args):
        methods = op_methods(*args) if whose == "ours" else torch_methods()
        bind = methods[0].bind
        methods[0] = dataclasses.replace(methods[0], bind=lambda x, packed: lambda: bind(x, packed)() * (1 + 1e-4))
        return methods

    monkeypatch.setattr(conv, "op_methods" if whose == "ours" else "torch_methods", wrong)
    rows = []
    with pytest.raises(RuntimeError, match=r"c17_9_n1, (F2|torch) nchw: relative error 1\.\d+e-04, allowed 1e-06"):
        run_conv(CASES, ConvOptions(**QUICK, ncnn=False), rows.append, print)
    assert rows == []


@pytest.mark.parametrize("how", ["fp16", "bf16"])
def test_half_precision_maps(how):
    rows, _ = run(conv_cases("16,8", (1,)), how=how, cold=False)
    assert {row.dtype for row in rows} == {"float16" if how == "fp16" else "bfloat16"}
    assert not any("direct" in row.what for row in rows)
    assert allowed_error(how, 2) > allowed_error("fp32", 2)


@needs_ncnn
def test_ncnn_is_a_rival_in_a_process_of_its_own():
    rows, _ = run(CASES[:1], ncnn=True)
    assert [row.baseline for row in of(rows, "best", WARM)][-1] == "ncnn"
    assert "ncnn" not in [row.baseline for row in of(rows, "best", COLD)]
    assert [row.baseline for row in rows if row.kind == "conv-median"].count("ncnn") == 1


def test_without_ncnn_it_is_said(monkeypatch):
    monkeypatch.setattr(conv, "missing", lambda name: ["ncnn"])
    _, said = run(CASES[:1], ncnn=True, cold=False)
    assert "ncnn is left out: not installed" in said[0]


@needs_ncnn
def test_ncnn_computes_the_convolution_with_copies_in_turn():
    weight, x = torch.randn(24, 12, 3, 3), torch.randn(3, 12, 9, 10)
    exact = torch.conv2d(x.double(), weight.double(), padding=1)
    rival = NcnnConv(1)
    got = torch.from_numpy(rival.prepare(weight.numpy(), x.numpy(), 2))
    assert float((got - exact).norm() / exact.norm()) < 1e-5
    for _ in range(3):
        rival.run()


@needs_ncnn
def test_ncnn_says_when_it_cannot_read(capfd):
    param, weights = convolution_net(torch.randn(8, 8, 3, 3))
    with pytest.raises(RuntimeError, match="cannot read"):
        NcnnNet(param.replace("Convolution", "Nonsense"), weights, 1)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads with reflect"),
        (torch.nn.Sigmoid(), "Sigmoid, which is not written"),
    ],
)
def test_what_ncnn_files_cannot_hold_is_named(module, message):
    with pytest.raises(ValueError, match=message):
        write_ncnn(torch.nn.Sequential(module), torch.zeros(1, 4, 8, 8))


def command(*words, **options):
    from repkern.cli.bench import app

    return CliRunner().invoke(app, ["conv", *words], env={"COLUMNS": "200"}, **options)


def test_command(tmp_path):
    path = tmp_path / "rows.csv"
    answer = command("--layer", "16,8", "--batch", "1", "--quick", "--no-ncnn", "--json", "--output", str(path))
    assert answer.exit_code == 0, answer.output
    printed = [json.loads(line) for line in answer.stdout.splitlines()]
    assert {row["case"] for row in printed} == {"c16_8_n1", "1 layers"}
    assert len(path.read_text().splitlines()) == len(printed) + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "64"], "channels,size"),
        (["--filter", "nothing"], "there are: c64_112_n1"),
        (["--tile", "3"], "2, 4, 5, 6"),
        (["--isa", "sse"], "avx512, avx2"),
        (["--precision", "int8"], "fp32, tf32"),
        (["--device", "tpu"], "cpu or cuda"),
    ],
)
def test_wrong_use_is_exit_code_2(words, message):
    answer = command(*words)
    assert answer.exit_code == 2
    assert message in answer.stderr


def test_forced_isa_is_a_new_process_with_both_sides_held_to_it(monkeypatch):
    from repkern.cli import bench

    asked = []
    monkeypatch.setattr(bench, "_again_with", lambda environment: asked.append(environment) or 7)
    for name in bench._FORCED_ISA["avx2"]:
        monkeypatch.delenv(name, raising=False)
    assert command("--isa", "avx2").exit_code == 7
    assert asked[0]["REPKERN_ISA"] == "avx2"
    assert asked[0]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "REPKERN_ISA" not in os.environ
