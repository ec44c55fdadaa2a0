"""`repkern bench blocks`: the plain networks are the same networks, rows are valid, a wrong block is not timed."""

import copy
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from repkern.bench import blocks, targets
from repkern.bench.blocks import BlocksOptions, load_blocks, parse_blocks, run_blocks
from repkern.bench.memory import kept_bytes
from repkern.bench.plain_blocks import plain_form
from repkern.nn import ACBlock, ConvNormAct, DiverseBranchBlock, RepVGGBlock

MIB = 2**20


def network(case=None):
    return nn.Sequential(
        ConvNormAct(3, 8, 3, 2, activation=nn.ReLU()), RepVGGBlock(8, 8, 3, activation=nn.ReLU()),
        DiverseBranchBlock(8, 8, 3, activation=nn.ReLU()), RepVGGBlock(8, 12, 3, 2), DiverseBranchBlock(12, 6, 3, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    collected = []
    options = BlocksOptions(pairs=2, model=network)
    assert run_blocks(parse_blocks("tiny net mixed 2 16"), options, collected.append, lambda text: None) == []
    return collected


def test_every_comparison_has_a_row(rows):
    assert [(row.kind, row.what, row.backend) for row in rows] == [
        ("blocks", "step", "mixed/auto"),
        ("blocks", "step", "mixed recompute/auto"),
        ("blocks-memory", "activations", "mixed/auto"),
        ("blocks-memory", "peak", "mixed/auto"),
        ("blocks-memory", "activations", "mixed recompute/auto"),
        ("blocks-memory", "peak", "mixed recompute/auto"),
    ]


def test_rows_are_valid(rows):
    for row in rows:
        assert row.ratio > 0
        assert math.isfinite(row.ratio)
        assert row.baseline == "plain"
        if row.kind == "blocks":
            assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
            assert 0 <= row.error_over_bound <= 1
        else:
            assert row.ratio == pytest.approx(row.extra_mib / row.limit_mib)


def test_recomputing_keeps_less(rows):
    kept = {row.backend: row.extra_mib for row in rows if row.what == "activations"}
    assert kept["mixed recompute/auto"] < kept["mixed/auto"]


def test_kept_bytes_are_what_the_result_holds():
    x = torch.zeros(MIB // 4, requires_grad=True)

    def forward():
        torch.empty(3 * MIB, dtype=torch.uint8)
        return (x * 2).exp().sum()  # exp keeps its result

    assert MIB <= kept_bytes(forward, "cpu") < MIB + 4096


def test_plain_networks_have_the_same_outputs_in_eval_mode():
    ours = network().double()
    for norm in (m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    plain = plain_form(copy.deepcopy(ours)).eval()
    assert not any(type(module).__module__.startswith("repkern.nn") for module in plain.modules() if not isinstance(
        module, nn.Conv2d))  # fmt: skip
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), plain(x), rtol=1e-10, atol=1e-10)


def test_blocks_without_a_plain_form_are_named():
    with pytest.raises(ValueError, match="`0`: there is no plain form of ACBlock"):
        plain_form(nn.Sequential(ACBlock(4, 4, 3)))
    with pytest.raises(ValueError, match="undilated"):
        plain_form(DiverseBranchBlock(4, 4, 3, dilation=2))


@pytest.mark.parametrize("wrong", ["dense_bn", "pointwise"])
def test_a_wrong_block_is_rejected(wrong, monkeypatch):
    def skewed(model):
        plain = plain_form(model)
        plain[1].get_submodule(wrong).register_forward_hook(lambda module, args, out: out * (1 + 1e-6))
        return plain

    monkeypatch.setattr(blocks, "plain_form", skewed)
    collected = []
    options = BlocksOptions(pairs=1, model=network)
    failures = run_blocks(parse_blocks("tiny net mixed 2 16"), options, collected.append, lambda text: None)
    assert len(failures) == (wrong == "dense_bn")  # a norm undoes what scales its input
    assert (collected == []) == (wrong == "dense_bn")
    assert all("float64 gradient of" in failure for failure in failures)


def test_targets_are_of_cases_there_are():
    names = {case.name for case in load_blocks(None)}
    for table in (*targets._BLOCK_STEPS.values(), *targets._BLOCK_ACTIVATIONS.values()):
        assert set(table) <= names
    assert str(targets.blocks_target("cpu", "repvgg_a0_b16_128", "none")) == "<= 0.9 x plain"
    assert targets.blocks_target("cuda", "repvgg_a0_b16_128", "none") is None
    assert str(targets.activations_target("cpu", "resnet18_dbb_b16_128", "cheap")) == "<= 0.75 x plain"


@pytest.mark.parametrize("line", ["a repvgg_a0 repvgg 16", "a repvgg_a0 repvgg x 8", "a repvgg_a0 repvgg 0 8"])
def test_bad_shapes_name_the_line(line):
    with pytest.raises(ValueError, match=r"shapes\.txt, line 2"):
        parse_blocks(f"# comment\n{line}\n", "shapes.txt")


def test_command(monkeypatch, tmp_path, rows):
    from repkern.bench import results
    from repkern.cli.bench import app

    def measured(cases, options, on_row, say):
        say(f"{cases[0].name} {cases[0].batch} {options.channels_last}")
        for row in rows:
            on_row(row)
        return []

    monkeypatch.setattr(blocks, "run_blocks", measured)
    path = tmp_path / "rows.csv"
    words = ["blocks", "--quick", "--channels-last", "--filter", "resnet18", "--output", str(path)]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    assert "resnet18_dbb_b16_128_quick 4 True" in answer.stdout
    assert "x plain at" in answer.stdout
    assert len(results.read_rows([path])) == len(rows)
