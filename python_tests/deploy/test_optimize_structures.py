"""optimize_for_inference and verify on models whose arguments and outputs hold tensors in other things."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import nn

from repkern import reparameterize
from repkern.deploy import optimize_for_inference
from repkern.nn import OREPABlock, ReparameterizeReport
from repkern.nn._trees import floating_tensors, leaves, map_tensors, same_structure

QUICK = {"cache": False, "progress": False, "methods": ()}


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple = ()
    step: int = 0


@dataclass(frozen=True)
class FrozenOutput:
    logits: torch.Tensor
    extra: dict = field(default_factory=dict)


class ModelOutput(OrderedDict):
    """A dictionary with a class of its own."""


class Body(nn.Module):
    def __init__(self, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.block = OREPABlock(3, 4, 3, padding=1, activation=nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.how = how
        self.train()
        with torch.no_grad():
            for _ in range(2):
                self.block(torch.randn(4, 3, 8, 8))
        self.eval()

    def features(self, x):
        y = self.block(x)
        return y, self.conv(y)


class Returns(Body):
    def forward(self, x):
        return self.how(*self.features(x))


def nested(y, z):
    return {"a": [y, (z, Pair(y))], "b": OrderedDict(c=Output(z, (y, z), 3)), "n": None, "name": "x"}


OUTPUTS = {
    "OrderedDict": lambda y, z: OrderedDict(out=z, aux=y),
    "subclass of OrderedDict": lambda y, z: ModelOutput(out=z, aux=y),
    "NamedTuple": lambda y, z: Pair(z, y),
    "dataclass": lambda y, z: Output(z, (y,), 2),
    "frozen dataclass": lambda y, z: FrozenOutput(z, {"aux": y}),
    "list": lambda y, z: [z, y],
    "nested": nested,
}


def equal(got, wanted, tolerance=1e-5):
    assert same_structure(got, wanted), (got, wanted)
    for one, other in zip(leaves(got), leaves(wanted), strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))
        else:
            assert one == other


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_kind_come_from_one_graph_and_keep_their_types(name):
    model, x = Returns(OUTPUTS[name]), torch.randn(2, 3, 8, 8)
    fast = optimize_for_inference(model, x, **QUICK)
    assert fast.report.traced, fast.report.notes
    assert len(fast.report.layers) == 2
    with torch.no_grad():
        equal(fast(x), model(x))


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_inside_in_half_come_back_in_float32(name):
    model, x = Returns(OUTPUTS[name]), torch.randn(2, 3, 8, 8)
    fast = optimize_for_inference(model, x, precision="bf16", **QUICK)
    assert fast.report.traced, fast.report.notes
    with torch.no_grad():
        equal(fast(x), model(x), 0.05)


@pytest.mark.parametrize("name", OUTPUTS)
def test_verify_sees_every_tensor_of_the_output(name):
    model, x = Returns(OUTPUTS[name]), torch.randn(2, 3, 8, 8)
    report = ReparameterizeReport()
    plain = reparameterize(model, verify=x, report=report)
    count = len(list(floating_tensors(model(x))))
    assert len(report.outputs) == len(report.in_float64) == count >= 2
    equal(plain(x), model(x))


class TakesKeyword(Body):
    def forward(self, x, *, scale=1.0, mask):
        y, z = self.features(x)
        return y * mask, z * scale


class TakesPair(Body):
    def forward(self, pair):
        return self.features(pair.first)[1] + pair.second


class TakesDataclass(Body):
    def forward(self, given):
        return self.features(given.logits)[1] + given.hidden[0]


class TakesImages(Body):
    def forward(self, images, targets=None):
        return [{"features": self.features(image[None])[1]} for image in images]


X, MASK = torch.randn(2, 3, 8, 8), torch.rand(2, 4, 8, 8)
ARGUMENTS = {
    "keyword only": (TakesKeyword, {"x": X, "mask": MASK}),
    "keyword only and a number": (TakesKeyword, {"x": X, "mask": MASK, "scale": 2.0}),
    "NamedTuple": (TakesPair, (Pair(X, MASK),)),
    "namedtuple of collections": (TakesPair, (namedtuple("Pair", "first second")(X, MASK),)),
    "dataclass": (TakesDataclass, (Output(X, (MASK,)),)),
    "frozen dataclass by name": (TakesDataclass, {"given": Output(X, (MASK,))}),
    "list of images": (TakesImages, ([X[0], X[1, :, :5, :6]],)),
}


def called(model, example):
    return model(**example) if isinstance(example, dict) else model(*example)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_every_kind_are_verified_in_float64_too(name):
    kind, example = ARGUMENTS[name]
    model, report = kind(), ReparameterizeReport()
    plain = reparameterize(model, verify=example, report=report)
    assert len(report.in_float64) == len(report.outputs) >= 1
    assert report.worst_in_float64.relative < 1e-12
    equal(called(plain, example), called(model, example))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_every_kind_are_optimized(name, precision):
    kind, example = ARGUMENTS[name]
    model = kind()
    fast = optimize_for_inference(model, example, precision=precision, **QUICK)
    assert len(fast.report.layers) == 2, fast.report.notes
    assert fast.report.traced == (kind is TakesKeyword)
    with torch.no_grad():
        equal(called(fast, example), called(model, example), 1e-5 if precision == "fp32" else 0.05)


def test_maps_that_a_module_collects_in_a_list_are_not_lost():
    class Collects(Body):
        def __init__(self):
            super().__init__()
            self.maps = []

        def forward(self, x):
            y, z = self.features(x)
            self.maps.append(y)
            return z

    model, x = Collects(), torch.randn(1, 3, 8, 8)
    fast = optimize_for_inference(model, x, **QUICK)
    assert not fast.report.traced
    assert "calling it changes" in fast.report.notes[0]
    assert model.maps == []


def test_a_missing_keyword_is_named_and_a_default_used():
    model = TakesKeyword()
    fast = optimize_for_inference(model, {"x": X, "mask": MASK}, **QUICK)
    with torch.no_grad():
        equal(fast(X, mask=MASK), model(X, mask=MASK))
    for call in (lambda: fast(X), lambda: fast(x=X)):
        with pytest.raises(TypeError, match="missing argument mask"):
            call()


def test_an_example_that_is_no_call_is_refused():
    for example in (3, "x", None):
        with pytest.raises(TypeError, match="the example must be"):
            optimize_for_inference(Returns(OUTPUTS["list"]), example)


def test_map_tensors_keeps_what_a_class_holds_besides():
    value = ModelOutput(a=torch.ones(2))
    value.note = "kept"
    new = map_tensors(lambda t: t * 2, {"deep": [value]})["deep"][0]
    assert type(new) is ModelOutput
    assert new.note == "kept"
    assert torch.equal(new["a"], torch.full((2,), 2.0))
    assert torch.equal(value["a"], torch.ones(2))
    pair = Pair(torch.ones(1))
    assert map_tensors(lambda t: t, pair) is pair


def test_outputs_whose_number_depends_on_rounding_are_compared_without_float64():
    """As a detector's boxes: float64 keeps another number of them."""

    class Keeps(Body):
        def forward(self, x):
            z = self.features(x)[1].flatten()
            return z[: 10 if z.dtype == torch.float32 else 12]

    report = ReparameterizeReport()
    reparameterize(Keeps(), verify=torch.randn(1, 3, 8, 8), report=report)
    assert len(report.outputs) == 1
    assert not report.in_float64
