"""The record of training form against deployed form: which cases there are, and that a difference is a failure."""

import importlib.util
from pathlib import Path

import torch

import repkern
from repkern.bench import equivalence, results
from repkern.bench.equivalence import equivalence_cases, run_equivalence
from repkern.models import default_block
from repkern.nn import KINDS

ROOT = Path(__file__).resolve().parents[2]


def test_every_model_is_compared_with_every_published_kind():
    cases = equivalence_cases()
    assert len(set(cases)) == len(cases)
    assert {name for name, _ in cases} == set(repkern.list_models())
    assert [kind for _, kind in equivalence_cases("resnet50")] == ["conv_bn", "repvgg", "acb", "dbb", "dyrep", "orepa"]
    assert ("repvgg_a2", "orepa_vgg") in cases
    assert all(kind in KINDS or kind == default_block(name) for name, kind in cases)


def test_rows():
    rows, said = [], []
    cases = [("repvgg_a0", "repvgg"), ("mobilenet_v1", "dbb")]
    assert run_equivalence(cases, rows.append, said.append, size=32, width=0.125) == []
    assert [(row.op, row.case, row.dtype) for row in rows] == [
        (*case, dtype) for case in cases for dtype in ("float64", "float32")
    ]
    assert all(row.verdict == "ok" and 0 < row.error_over_bound < 1 for row in rows)
    assert len(said) == 4


def test_the_documents_show_the_largest_difference_of_every_kind(tmp_path):
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "benchmarks" / "make_docs.py")
    make_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_docs)
    env = results.environment()
    for name, over in (("resnet18", 2e-5), ("resnet50", 3e-5), ("resnet18", 1e-5)):
        for dtype, bound in equivalence.BOUNDS.items():
            row = equivalence._row(name, "dbb", str(dtype).removeprefix("torch."), over * bound, bound, "ok")
            results.append_row(tmp_path / "machine.csv", env, row)
    text = make_docs.documents(tmp_path)["performance.md"]
    assert "| `dbb` | 2 | 3.0e-15 (resnet50) | 3.0e-10 (resnet50) | 0 |" in text
    assert "### Targets" not in text


def test_a_difference_is_a_failure(monkeypatch):
    def wrong(model):
        plain = repkern.reparameterize(model)
        with torch.no_grad():
            plain.stages[1][0].conv.bias += 1e-3
        return plain

    monkeypatch.setattr(equivalence, "reparameterize", wrong)
    rows = []
    failures = run_equivalence([("repvgg_a0", "repvgg")], rows.append, lambda text: None, size=32, width=0.125)
    assert [row.verdict for row in rows] == ["short", "short"]
    assert failures[0].startswith("repvgg_a0 repvgg float64: ")
    assert failures[0].endswith(" exceeds 1e-10")
