"""optimize_for_inference on models that were not written for it: what is not understood stays, and nothing breaks."""

import pytest
import torch
from torch import nn

import repkern
from repkern.deploy import InferenceConv2d
from repkern.deploy._methods import METHODS


@pytest.fixture(autouse=True)
def _untimed(monkeypatch, tmp_path):
    """Ours are the fastest everywhere, so that they are used wherever they can run."""
    order = {name: 1.0 + at for at, name in enumerate(reversed(METHODS))}
    monkeypatch.setattr("repkern.deploy._choice.time_calls", lambda calls, x: {name: order[name] for name in calls})
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path))


def conv(before=8, after=8, **options):
    return nn.Conv2d(before, after, 3, **{"padding": 1, **options})


def optimized(model, *args, **options):
    """The optimized model, after comparing it with the given one on the example and on another one."""
    model = model.eval().requires_grad_(False)
    fast = repkern.optimize_for_inference(model, args, cache=False, **{"memory": None, **options})
    for given in (args, tuple(arg.roll(1, 0) * 0.5 if isinstance(arg, torch.Tensor) else arg for arg in args)):
        same(fast(*given), model(*[arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in given]))
    return fast


def same(got, wanted):
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)
        got, wanted = list(got.values()), list(wanted.values())
    if isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            same(one, other)
        return
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    limit = 1e-5 if wanted.dtype == torch.float32 else 2e-2
    assert float((got.float() - wanted.float()).abs().max()) <= limit * float(wanted.abs().max())


def maps(*shape):
    return torch.randn(shape or (2, 8, 12, 12))


def fused(fast):
    return [layer.fused for layer in fast.report.layers]


class Written(nn.Module):
    """A model whose forward is the given function of it and its input."""

    def __init__(self, forward, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def test_output_of_a_convolution_that_is_read_elsewhere():
    def forward(self, x):
        y = self.conv(x)
        return torch.relu(y) + self.second(y), y

    assert fused(optimized(Written(forward, conv=conv(), second=conv()), maps())) == [[], ["add"]]


def test_one_convolution_at_two_places():
    model = Written(lambda self, x: torch.relu(self.bn(self.conv(x))) + self.conv(x), conv=conv(), bn=nn.BatchNorm2d(8))
    model.bn.running_mean.normal_()
    fast = optimized(model, maps())
    assert fused(fast) == [[]]
    assert isinstance(fast.bn, nn.BatchNorm2d)


def test_one_norm_after_two_convolutions():
    model = Written(
        lambda self, x: self.bn(self.one(x)) * self.bn(self.two(x)), one=conv(), two=conv(), bn=nn.BatchNorm2d(8)
    )
    model.bn.running_var.uniform_(0.5, 2)
    assert fused(optimized(model, maps())) == [["BatchNorm"], ["BatchNorm"]]


def test_hooks_still_run_and_stop_fusing():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.ReLU())
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    fast = optimized(model, maps())
    assert fused(fast) == [["BatchNorm"]]
    assert fast.report.kept == {"3": "it has hooks"}
    seen.clear()
    fast(maps())
    assert seen == [(2, 8, 12, 12)]


def test_hooks_on_the_model_itself():
    model = nn.Sequential(conv(), nn.ReLU())
    model.register_forward_hook(lambda module, args, output: output + 1)
    fast = optimized(model, maps())
    assert not fast.report.traced
    assert "hooks" in fast.report.notes[0]


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled(8, 8, 3, padding=1), "subclass of Conv2d"),
        (conv(padding_mode="reflect"), "padding_mode is 'reflect'"),
        (nn.Conv2d(8, 8, 4, padding="same"), "not the same on both sides"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolutions_that_stay(layer, reason):
    fast = optimized(nn.Sequential(layer, nn.ReLU(), conv()), maps())
    assert reason in fast.report.kept["0"]
    assert len(fast.report.layers) == 1


@pytest.mark.parametrize(
    "layer",
    [
        conv(dilation=2, padding=2),
        conv(groups=2),
        conv(groups=8),
        conv(stride=(2, 1)),
        conv(padding=(2, 0)),
        conv(padding="same"),
        conv(padding="valid", bias=False),
        nn.Conv2d(8, 5, (1, 3), padding=(0, 1)),
        nn.Conv2d(8, 8, 7, 2, 3),
    ],
    ids=str,
)
def test_every_geometry(layer):
    assert fused(optimized(nn.Sequential(layer, nn.ReLU6()), maps(2, 8, 13, 11))) == [["relu6"]]


def test_transposed_and_one_dimensional_convolutions_stay():
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 3), conv(), nn.Flatten(2), nn.Conv1d(8, 4, 3))
    assert len(optimized(model, maps()).report.layers) == 1


def test_control_flow_on_values():
    def forward(self, x):
        return self.body(x) if float(x.sum()) > -1e9 else x

    model = Written(forward, body=nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv()))
    model.body[1].running_mean.normal_()
    fast = optimized(model, maps())
    assert not fast.report.traced
    assert not fast.report.channels_last
    assert fused(fast) == [["BatchNorm", "relu"], []]
    assert any("not as one graph" in note for note in fast.report.notes)
    x = maps(1, 8, 5, 9)
    same(fast(x), model(x))


def test_sequential_whose_inside_is_read():
    """Its children are called one by one, and what is between them is returned: fusing would change that."""

    def forward(self, x):
        taps = []
        for layer in self.body:
            x = layer(x)
            taps.append(x.clone())
        return taps if float(taps[0].sum()) > -1e9 else None

    model = Written(forward, body=nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv()))
    model.body[1].running_mean.normal_()
    fast = optimized(model, maps())
    assert fused(fast) == [[], []]
    assert any("outputs differ" in note for note in fast.report.notes)


def test_state_that_a_call_leaves_behind():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.last = x
            return torch.relu(self.conv(x))

    model = Counts()
    fast = optimized(model, maps())
    assert not fast.report.traced
    assert "changes Counts" in fast.report.notes[0]
    before = fast._body.calls
    fast(maps())
    assert fast._body.calls == before + 1
    assert isinstance(fast._body.last, torch.Tensor)


def test_branches_on_the_kind_of_input():
    """A tracer's stand-in is no tensor, so the graph would take the other branch; the comparison finds out."""

    def forward(self, x):
        return self.conv(x) if isinstance(x, torch.Tensor) else self.other(x)

    fast = optimized(Written(forward, conv=conv(), other=conv()), maps())
    assert not fast.report.traced
    assert "outputs differ" in fast.report.notes[0]


def test_in_place_between_convolution_and_sum():
    """x changes after the convolution has read it, so the convolution may not move to the sum."""

    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        x.mul_(3)
        return torch.relu(y + x)

    assert fused(optimized(Written(forward, conv=conv()), maps())) == [[]]


def test_sum_into_the_shortcut():
    def forward(self, x):
        kept = x * 2
        kept.add_(self.conv(x))
        return torch.relu(kept) + kept

    assert fused(optimized(Written(forward, conv=conv()), maps())) == [[]]


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 1, 1), (1,)])
def test_sum_that_broadcasts_is_not_fused(shape):
    model = Written(lambda self, x: torch.relu(self.conv(x) + self.offset), conv=conv())
    model.register_buffer("offset", torch.randn(shape))
    assert fused(optimized(model, maps())) == [[]]


def test_shortcut_that_broadcasts_at_another_size():
    model = Written(lambda self, x: torch.relu(self.conv(x) + x.mean((2, 3), keepdim=True)), conv=conv(padding=0))
    model.eval().requires_grad_(False)
    fast = repkern.optimize_for_inference(model, maps(1, 8, 3, 3), cache=False)
    assert fused(fast) == [["add", "relu"]]
    other = maps(1, 8, 9, 7)
    same(fast(other), model(other))


def test_sum_of_a_value_with_itself():
    assert fused(optimized(Written(lambda self, x: (y := self.conv(x)) + y, conv=conv()), maps())) == [[]]


def test_sums_by_every_name():
    def forward(self, x):
        x = torch.add(self.a(x), x)
        x = self.b(x).add(x)
        x = self.c(x).add_(x)
        x = x + self.d(x)
        return torch.add(self.e(x), x, alpha=2)

    model = Written(forward, **{name: conv() for name in "abcde"})
    assert fused(optimized(model, maps())) == [["add"]] * 4 + [[]]


def test_views_in_any_memory_order():
    def forward(self, x):
        y = self.conv(x)
        n, c, h, w = y.size()
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)  # channel shuffle
        return self.second(y).view(n, -1)

    fast = optimized(Written(forward, conv=conv(), second=conv()), maps())
    assert fast.report.channels_last


def test_writing_through_a_view():
    def forward(self, x):
        y = self.conv(x)
        y.view(y.shape[0], -1).mul_(2)
        return y

    fast = optimized(Written(forward, conv=conv()), maps())
    assert not fast.report.channels_last


def test_strides_that_are_asked_for():
    def forward(self, x):
        y = self.conv(x)
        return y.as_strided((2, 8, 6, 12), y.stride()).clone()

    assert not optimized(Written(forward, conv=conv()), maps()).report.channels_last


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x, y, scale: float = 1.0, mask=None, *, flip=False):
        z = torch.relu(self.conv(x) + y) * scale
        z = z if mask is None else z * mask
        return {"sum": z, "flipped": [z.flip(-1) if flip else z, y]}


def test_several_arguments_and_nested_outputs():
    fast = optimized(Several(), maps(), maps(), 0.5)
    assert fast.report.traced
    x, y = maps(), maps()
    same(fast(y=y, x=x, scale=0.5), fast(x, y, 0.5))
    with pytest.raises(AssertionError, match="scale has been specialized"):
        fast(x, y, 0.25)
    with pytest.raises(TypeError, match="unexpected arguments nothing; the model takes x, y, scale, mask, flip"):
        fast(x, y, nothing=1)
    optimized(Several(), maps(), maps(), 0.5, torch.rand(2, 1, 12, 12))


def test_arguments_in_a_dictionary():
    class Batch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, batch):
            return torch.relu(self.conv(batch["image"]))

    model = Batch().eval().requires_grad_(False)
    batch = {"image": maps()}
    fast = repkern.optimize_for_inference(model, (batch,), cache=False)
    same(fast(batch), model(batch))
    assert len(fast.report.layers) == 1


@pytest.mark.parametrize(
    "model",
    [conv(), nn.Sequential(), nn.Sequential(nn.Linear(12, 4)), nn.ReLU(), nn.Identity()],
    ids=lambda model: type(model).__name__,
)
def test_models_that_are_hardly_any(model):
    fast = optimized(model, maps())
    assert set(fast.state_dict()) == set(model.state_dict())


def test_norm_that_cannot_be_folded():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    assert fused(optimized(model, maps())) == [[]]


def test_half_precision_models():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv()).bfloat16()
    fast = optimized(model, maps().bfloat16())
    assert fast(maps().bfloat16()).dtype == torch.bfloat16
    assert fast.state_dict()["0.weight"].dtype == torch.bfloat16


def test_double_models():
    model = nn.Sequential(conv(), nn.ReLU()).double()
    fast = optimized(model, maps().double())
    x = maps().double()
    assert float((fast(x) - model(x)).abs().max()) < 1e-13
    assert [layer.method for layer in fast.report.layers] == ["torch"]


def test_a_convolution_that_the_example_does_not_reach():
    model = Written(lambda self, x: self.body[0](x) if float(x.sum()) > -1e9 else self.body[1](x))
    model.body = nn.ModuleList([conv(), conv()])
    fast = optimized(model, maps())
    assert [layer.why for layer in fast.report.layers][1] == "the example does not reach it"


def test_weights_that_are_shared():
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    model[2].weight = model[0].weight
    optimized(model, maps())


def test_a_model_that_does_not_run_says_so():
    with pytest.raises(RuntimeError, match="channels"):
        repkern.optimize_for_inference(nn.Sequential(conv()), maps(1, 5, 8, 8))


def test_noise_cannot_be_compared_and_nothing_is_exchanged():
    model = Written(lambda self, x: self.conv(x) + torch.randn_like(x), conv=conv()).eval().requires_grad_(False)
    fast = repkern.optimize_for_inference(model, maps(), cache=False)
    assert fast.report.notes[-1] == "nothing was exchanged"
    assert not [module for module in fast.modules() if isinstance(module, InferenceConv2d)]
    assert fast(maps()).shape == (2, 8, 12, 12)
