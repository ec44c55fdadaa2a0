"""The benchmark harness: rows are valid, ratios come from pairs, a wrong kernel is never timed."""

import json
import math
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from repkern.bench import ops, results, targets, timing
from repkern.bench.ops import OpsOptions, default_backends, run_ops
from repkern.bench.peak import Peak
from repkern.bench.problems import build_problem
from repkern.bench.registry import Case, Layer, load_cases, parse_cases
from repkern.bench.train import EagerOREPA, TrainOptions, parse_steps, run_train
from repkern.nn import OREPAConv2d

TINY = """
plain      orepa_squeeze       8,8,3,1
grouped    orepa_squeeze       16,16,3,8
depthwise  orepa_squeeze       6,6,5,6
one        orepa_squeeze       8,4,1,1
many       orepa_squeeze_many  8,4,3,1*2 5,3,1,1
stem       compose_sequential  8,4,5,2 6,8,3,2
norms      branch_norm_add     2,3,5,4*3
last       branch_norm_add     2,5,3,4*2 channels_last
"""
QUICK = {"pairs": 3, "min_sample_seconds": 1e-4, "quick": True}


def options(**changes):
    return OpsOptions(**({"backends": default_backends("cpu"), "baselines": ("eager", "conv2d"), **QUICK} | changes))


@pytest.fixture(scope="module")
def rows():
    collected = []
    assert run_ops(parse_cases(TINY), options(), collected.append, lambda text: None) == []
    return collected


def test_every_case_and_pass_has_a_row_of_its_own_and_one_against_eager(rows):
    wanted = {(c.name, what) for c in parse_cases(TINY) for what in ("forward", "backward", "forward+backward")}
    for baseline in ("", "eager"):
        assert {(r.case, r.what) for r in rows if r.baseline == baseline} == wanted


def test_rows_are_valid(rows):
    for row in rows:
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert 0 <= row.error_over_bound <= 1
        assert row.pairs == 3
        if row.baseline:
            assert 0 < row.ratio_p20 <= row.ratio <= row.ratio_p80
            assert row.baseline_ms > 0
        else:
            assert 0 < row.peak_percent < 300
            assert row.peak_gflops > 0


def test_ratio_is_of_neighbouring_samples_not_of_medians():
    a, b = [1.0, 4.0, 9.0], [1.0, 1.0, 9.0]
    assert timing.ratio_of_pairs(a, b).p50 == 1.0
    assert timing.quantiles(a).p50 / timing.quantiles(b).p50 == 4.0
    with pytest.raises(ValueError, match="3 and 2"):
        timing.ratio_of_pairs(a, b[:2])


def test_samples_are_interleaved_and_preparation_is_not_timed():
    calls = []

    def work(name):
        return timing.Workload(lambda _: calls.append(name), prepare=lambda: time.sleep(0.002))

    samples = timing.measure_pairs({"a": work("a"), "b": work("b")}, pairs=4, min_sample_seconds=0)
    assert "".join(calls[-8:]) == "abababab"
    assert max(samples["a"] + samples["b"]) < 0.002


def test_slow_work_gets_fewer_pairs():
    work = {"a": timing.Workload(lambda _: time.sleep(0.01))}
    assert len(timing.measure_pairs(work, pairs=50, max_seconds=0.08)["a"]) in (5, 6, 7)
    assert len(timing.measure_pairs(work, pairs=3, max_seconds=0.0)["a"]) == 3
    assert len(timing.measure_pairs(work, pairs=9)["a"]) == 9


def test_a_busy_machine_is_measured_again_and_then_told():
    said, runs = [], []
    peak = Peak(1e9, "impossible", "", None, 1.0, lambda: runs.append(1))
    work = {"a": timing.Workload(lambda _: None), "peak": timing.Workload(lambda _: peak.run())}
    busy = options(quick=False, pairs=1, min_sample_seconds=0)
    assert len(ops._undisturbed(work, peak, busy, said.append)["a"]) == 1
    assert ["again" in text for text in said] == [True, True, False]
    assert "busy machine" in said[-1]


@pytest.mark.parametrize("broken", ["scaled", "branch", "gradient"])
def test_a_wrong_kernel_is_rejected(broken):
    def wrong(problem):
        def forward():
            outputs = problem.ours()
            if broken == "scaled":
                return [output * (1 + 1e-4) for output in outputs]
            if broken == "branch":
                return [output - 1e-3 * problem.leaves[0] for output in outputs]
            return [output + (output - output.detach()) * 1e-3 for output in outputs]

        return forward

    collected, said = [], []
    backend = default_backends("cpu")[0]
    case = [Case("c16", "orepa_squeeze", (Layer(16, 16, 3, 1),))]
    failures = run_ops(case, options(ours={backend: wrong}), collected.append, said.append)
    assert len(failures) == 1
    assert "c16" in failures[0]
    assert "gradient" in failures[0] or broken != "gradient"
    assert collected == []


def test_a_failed_check_is_exit_code_1(monkeypatch, tmp_path):
    from repkern.cli.bench import app

    monkeypatch.setattr(ops, "run_ops", lambda *_: ["c64: cpu differs"])
    answer = CliRunner().invoke(app, ["ops", "--quick", "--filter", "c64"])
    assert answer.exit_code == 1
    assert "c64: cpu differs" in answer.stderr


def test_ctrl_c_keeps_the_rows_so_far(monkeypatch, tmp_path, rows):
    from repkern.cli.bench import app

    def interrupted(cases, options, on_row, say):
        on_row(rows[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "run_ops", interrupted)
    path = tmp_path / "rows.csv"
    answer = CliRunner().invoke(app, ["ops", "--quick", "--output", str(path)])
    assert answer.exit_code == 130
    assert [row["case"] for row in results.read_rows([path])] == [rows[0].case]


def test_command_appends_rows_and_prints_json(tmp_path):
    from repkern.cli.bench import app

    shapes = tmp_path / "tiny.txt"
    shapes.write_text("x1 orepa_squeeze 8,8,3,1\nx2 orepa_squeeze 4,4,3,1\n")
    path = tmp_path / "rows.csv"
    words = [
        "ops",
        "--quick",
        "--shapes",
        str(shapes),
        "--filter",
        "x1",
        "--output",
        str(path),
        "--json",
        "--pairs",
        "1",
    ]
    for _ in range(2):
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, answer.output
    printed = [json.loads(line) for line in answer.stdout.splitlines()]
    stored = results.read_rows([path])
    assert len(stored) == 2 * len(printed)
    assert {row["case"] for row in stored} == {"x1"}
    assert all(row["torch"] == torch.__version__ for row in stored)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter", "nothing_like_this"], "there are: c64"),
        (["--baseline", "magic"], "eager, compile, conv2d"),
        (["--backend", "magic"], "auto, reference, cpu"),
        (["--device", "tpu"], "must be cpu or cuda"),
        (["--dtype", "int8"], "float32 or float64"),
        (["--cuda-graph"], "needs --device cuda"),
        (["--shapes", "no_such_file.txt"], "no_such_file.txt"),
    ],
)
def test_wrong_use_is_exit_code_2(words, message):
    from repkern.cli.bench import app

    answer = CliRunner().invoke(app, ["ops", *words], env={"COLUMNS": "200"})
    assert answer.exit_code == 2
    assert message in answer.stderr


@pytest.mark.parametrize(
    "line",
    [
        "c64 unknown_op 1,1,3,1",
        "c64 orepa_squeeze 64,64,3",
        "c64 orepa_squeeze 64,64,2,1",
        "c64 orepa_squeeze",
        "bn branch_norm_add 2,3,4",
        "bn branch_norm_add 1,3,1,1*2",
        "bn branch_norm_add 2,3,4,4*17",
        "bn branch_norm_add 2,3,4,4 last",
    ],
)
def test_bad_shapes_name_the_line(line):
    with pytest.raises(ValueError, match=r"shapes\.txt, line 2"):
        parse_cases(f"# comment\n{line}\n", "shapes.txt")


def test_a_file_with_other_columns_is_left_alone(tmp_path, rows):
    path = tmp_path / "old.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append_row(path, results.environment(), rows[0])
    assert path.read_text() == "a,b\n1,2\n"


def test_flops_of_the_squeeze():
    for c in (64, 512):
        counted = Case("", "orepa_squeeze", (Layer(c, c, 3, 1),)).flops("forward")
        assert counted == 18 * c**3 + 252 * c**2
    resnet = next(case for case in load_cases(None) if case.name == "resnet18")
    repvgg = next(case for case in load_cases(None) if case.name == "repvgg_a0")
    assert (len(resnet.layers), len(repvgg.layers)) == (16, 22)


def test_verdicts():
    at_least, at_most = targets.Target(3, "x"), targets.Target(1.1, "x plain", at_most=True)
    assert targets.verdict(at_least, 3.0) == targets.verdict(at_most, 1.1) == "ok"
    assert targets.verdict(at_least, 2.4) == "short by 20.0 %"
    assert targets.verdict(at_most, 1.21) == "short by 10.0 %"
    assert targets.verdict(None, 1.0) == ""


@pytest.mark.parametrize("case", parse_cases(TINY), ids=lambda case: case.name)
def test_the_baseline_is_the_same_function_in_float64(case):
    problem = build_problem(case, dtype=torch.float64)
    assert problem.check(problem.baseline(lambda function: function)).ok


@pytest.mark.parametrize(
    "arguments", [(4, 6, 3), (6, 4, 1), (4, 6, 1), (8, 8, 3, 2, 1, 1, 4), (4, 4, 5, 1, 2, 1, 1, False)]
)
def test_the_unfused_module_is_the_same_module(arguments):
    block = OREPAConv2d(*arguments, dtype=torch.float64)
    x = torch.randn(2, arguments[0], 9, 9, dtype=torch.float64)
    torch.testing.assert_close(EagerOREPA(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_train_rows(monkeypatch):
    def small():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1),
            nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip

    collected = []
    said = []
    options = TrainOptions(pairs=2, model=small)
    assert run_train(parse_steps("tiny 2 16"), options, collected.append, said.append) == []
    assert said[0] == "2 convolutions are OREPA"
    steps = [row for row in collected if row.kind == "train"]
    assert [row.backend for row in steps] == ["orepa/auto", "eager"]
    assert all(row.ratio > 0 and math.isfinite(row.ratio) for row in steps)
    memory = [row for row in collected if row.kind == "memory"]
    assert {row.backend for row in memory} == {"orepa/auto", "eager"}
    assert all(row.limit_mib > 0 for row in memory)
