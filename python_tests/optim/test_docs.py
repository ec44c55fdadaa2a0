"""What docs/repoptimizers.md shows runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

import repkern
from repkern.models.digits import DigitsNet

PAGE = Path(__file__).resolve().parents[2] / "docs" / "repoptimizers.md"


def test_the_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, ghost = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    batches = [(torch.randn(4, 1, 8, 8), torch.arange(4))] * 2
    names = {"torch": torch, "model": DigitsNet((4, 8), 1), "loss": nn.CrossEntropyLoss(), "batches": batches}
    exec(first, names)
    optimizer, model = names["optimizer"], names["model"]
    before = model.stem[0].weight.clone()
    names["loss"](model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert not torch.equal(model.stem[0].weight, before)
    assert len(optimizer.grad_mults) == 5
    names |= {"repkern": repkern}
    exec(ghost, names)
    assert len(names["search"].scales()) == 64
