"""Parameters that share memory are refused by steps and optimizers, on every backend; interleaved ones are fine."""

import pytest
import torch

from repkern.ops import grad_mult_adamw_, grad_mult_sgd_, use_backend
from repkern.ops._overlap import overlapping
from repkern.optim import RepAdamW, RepSGD

BASE = torch.zeros(24)
SHARED = {
    "ranges": (BASE[:4], BASE[2:6]),
    "one inside the other": (BASE[:10], BASE[3:5]),
    "views of one": (BASE.view(4, 6), BASE.view(6, 4)),
    "a column and its matrix": (BASE.view(4, 6), BASE.view(4, 6)[:, 2]),
    "crossing": (BASE.view(4, 6)[1], BASE.view(4, 6)[:, 2]),
    "another dtype": (BASE[:4], BASE.view(torch.int32)[3:5].view(torch.float32)),
    "far apart in the list": (BASE[:4], torch.zeros(3), torch.zeros(5), BASE[3:4]),
}
APART = {
    "ranges": (BASE[:4], BASE[4:6]),
    "columns": (BASE.view(4, 6)[:, :2], BASE.view(4, 6)[:, 2:]),
    "every second": (BASE[::2], BASE[1::2]),
    "empty": (BASE[2:2], BASE),
}


@pytest.mark.parametrize("tensors", SHARED.values(), ids=SHARED)
def test_shared(tensors):
    found = overlapping(tensors)
    assert found == (0, len(tensors) - 1)
    assert overlapping(tensors[::-1]) == found
    for kind in (RepSGD, RepAdamW):
        params = [torch.nn.Parameter(t) for t in tensors]
        with pytest.raises(ValueError, match=r"lie in the same memory"):
            kind(params, lr=0.1)
        optimizer = kind([params[0]], lr=0.1)
        with pytest.raises(ValueError, match=r"parameter 0 \(.*\) and parameter 1 \(.*lie in the same memory"):
            optimizer.add_param_group({"params": [params[-1]]})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("tensors", APART.values(), ids=APART)
def test_apart(tensors):
    assert overlapping(tensors) is None
    RepSGD([torch.nn.Parameter(t) for t in tensors], lr=0.1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_steps_refuse_what_they_would_update_twice(backend):
    param, grads = [BASE[:4], BASE[2:6]], [torch.ones(4), torch.ones(4)]
    apart = [torch.zeros(4), torch.zeros(4)]
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"`params\[1\]` and `params\[0\]` lie in the same memory"):
            grad_mult_sgd_(param, grads, None, None, lr=0.1, weight_decay=0.0)
        with pytest.raises(ValueError, match=r"lie in the same memory"):
            grad_mult_sgd_(apart, grads, param, None, lr=0.1, weight_decay=0.0, momentum=0.9)
        with pytest.raises(ValueError, match=r"lie in the same memory"):
            grad_mult_adamw_(
                apart, grads, apart, [torch.zeros(4), torch.zeros(4)], None, None, lr=0.1, betas=(0.9, 0.9), eps=1e-8,
                weight_decay=0.0, steps=[torch.zeros(()), torch.zeros(())],
            )  # fmt: skip
    assert not BASE.any()


_NUMBERS = (-0.1, float("nan"), float("inf"), None, "0.1", [0.1], 1j, True)
_BETAS = ((0.9,), None, 0.9, "ab", (0.9, None), (0.9, float("nan")), (1.0, 0.9), (-0.1, 0.9))
_SETTINGS = [
    *((RepSGD, name, wrong) for name in ("lr", "weight_decay", "momentum") for wrong in _NUMBERS),
    *((RepSGD, "dampening", wrong) for wrong in _NUMBERS[1:]),
    *((RepAdamW, name, wrong) for name in ("lr", "weight_decay", "eps") for wrong in _NUMBERS),
    *((RepAdamW, "betas", wrong) for wrong in _BETAS),
]


@pytest.mark.parametrize(("kind", "name", "wrong"), _SETTINGS)
def test_settings_of_optimizers(kind, name, wrong):
    with pytest.raises((ValueError, TypeError), match=name):
        kind([torch.nn.Parameter(torch.zeros(3))], **{name: wrong})
    optimizer = kind([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], name: wrong})
