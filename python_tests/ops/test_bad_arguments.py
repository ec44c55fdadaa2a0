"""What must not reach a kernel: extreme integers, what is not a tensor, tensors of other kinds. Errors name it."""

import pytest
import torch

from repkern.ops import (
    Norm,
    SqueezeBranches,
    branch_norm_add,
    branch_norm_add_backward,
    branch_norm_statistics,
    branch_norm_sums,
    compose_sequential,
    direct_conv2d,
    direct_conv2d_packed,
    direct_pack_weight,
    direct_unpack_weight,
    grad_mult_adamw_,
    grad_mult_sgd_,
    orepa_squeeze,
    orepa_squeeze_many,
    winograd_conv2d,
    winograd_conv2d_packed,
    winograd_pack_weight,
    winograd_stride2_conv2d,
    winograd_stride2_conv2d_packed,
    winograd_stride2_transform_weight,
    winograd_transform_weight,
)

X, W = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
PACKED = direct_pack_weight(W, method="fma")
MAP, C = torch.randn(2, 3, 4, 4), torch.ones(1, 3)
# (function, the arguments that it takes, those of them that are tensors)
CALLS = {
    "compose": (compose_sequential, {"first": torch.randn(2, 3, 3, 3), "second": W, "groups": 1}),
    "squeeze": (orepa_squeeze, {"origin": W, "avg": W[:, :, 0, 0], "groups": 1}),
    "direct": (direct_conv2d, {"x": X, "weight": W, "bias": W[:, 0, 0, 0], "groups": 1, "stride": 1, "padding": 0}),
    "direct_packed": (direct_conv2d_packed, {"x": X, "packed": PACKED, "out_channels": 3, "kernel_size": 3}),
    "direct_pack": (direct_pack_weight, {"weight": W, "groups": 1}),
    "direct_unpack": (
        direct_unpack_weight, {"packed": PACKED, "out_channels": 3, "in_channels": 2, "kernel_size": 3, "groups": 1},
    ),
    "winograd": (winograd_conv2d, {"x": X, "weight": W, "padding": 1, "groups": 1, "tile": 4}),
    "winograd_packed": (
        winograd_conv2d_packed, {"x": X, "packed": winograd_pack_weight(W), "out_channels": 3, "tile": 4, "padding": 1},
    ),
    "winograd_pack": (winograd_pack_weight, {"weight": W, "groups": 1}),
    "winograd_transform": (winograd_transform_weight, {"weight": W, "tile": 4, "groups": 1}),
    "stride2": (winograd_stride2_conv2d, {"x": X, "weight": W, "padding": 1, "groups": 1}),
    "stride2_packed": (
        winograd_stride2_conv2d_packed, {"x": X, "packed": winograd_pack_weight(W), "out_channels": 3, "padding": 1},
    ),
    "stride2_transform": (winograd_stride2_transform_weight, {"weight": W, "groups": 1}),
    "sums": (branch_norm_sums, {"grad": MAP, "branches": [MAP], "norms": [Norm()], "mean": C, "var": C}),
    "norm_backward": (
        branch_norm_add_backward, {"grad": MAP, "branches": [MAP], "norms": [Norm()], "mean": C, "var": C},
    ),
    "norms": (branch_norm_add, {"branches": [MAP], "norms": [Norm()]}),
    "statistics": (branch_norm_statistics, {"branches": [MAP]}),
}  # fmt: skip
TENSORS = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, (_, arguments) in CALLS.items()
    for argument, value in arguments.items()
    if isinstance(value, torch.Tensor) and argument != "bias"
]
INTEGERS = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, (_, arguments) in CALLS.items()
    for argument, value in arguments.items()
    if type(value) is int
]
EXTREME = (-(2**63), -(2**31), -1, 2**31, 2**33 + 1, 2**62, 2**63 - 1, 2**63, 10**30)


def call(name, **changes):
    function, arguments = CALLS[name]
    with torch.no_grad():
        return function(**{**arguments, **changes})


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right_as_they_are(name):
    call(name)


@pytest.mark.parametrize("wrong", [[1.0], 1.5, "x", {}], ids=["list", "float", "str", "dict"])
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_what_is_not_a_tensor_is_named(name, argument, wrong):
    with pytest.raises(TypeError, match=rf"`(layers\[0\]\.)?{argument}` must be a tensor.*got {type(wrong).__name__}"):
        call(name, **{argument: wrong})


@pytest.mark.parametrize(("name", "argument"), [t for t in TENSORS if t.values[0] != "squeeze"])
def test_none_is_named(name, argument):
    with pytest.raises(TypeError, match=f"`{argument}` must be a tensor.*got NoneType"):
        call(name, **{argument: None})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.new_ones(()),
        lambda t: t[:0],
        lambda t: t[..., :0],
        lambda t: t.to_sparse(),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.complex64).conj(),
        lambda t: t.int(),
        lambda t: t.bool(),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: t.to("meta"),
        lambda t: t.new_ones(1).expand(2**40, *t.shape[1:]),
    ],
    ids=[
        "scalar",
        "empty",
        "narrow",
        "sparse",
        "complex",
        "conjugate",
        "int",
        "bool",
        "quantized",
        "float8",
        "meta",
        "huge",
    ],
)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_other_tensors_are_refused(name, argument, change):
    value = change(CALLS[name][1][argument])
    try:
        made = call(name, **{argument: value})
    except (ValueError, TypeError, RuntimeError):
        return
    outputs = [made] if isinstance(made, torch.Tensor) else [t for t in made if isinstance(t, torch.Tensor)]
    # What has no data gives a result without; weights alone are moved, not multiplied.
    assert value.is_meta or name in ("direct_unpack", "squeeze"), outputs


@pytest.mark.parametrize("wrong", [1.5, float("inf"), float("nan"), "1", None, [1], True], ids=str)
@pytest.mark.parametrize(("name", "argument"), INTEGERS)
def test_what_is_not_an_integer_is_named(name, argument, wrong):
    if argument in ("tile",) and wrong == "1":
        pytest.skip("a word is asked about as one")
    with pytest.raises((TypeError, ValueError), match=f"`(layers\\[0\\]\\.)?{argument}`"):
        call(name, **{argument: wrong})


@pytest.mark.parametrize("value", EXTREME)
@pytest.mark.parametrize(("name", "argument"), INTEGERS)
def test_extreme_integers_are_refused_or_harmless(name, argument, value):
    try:
        call(name, **{argument: value})
    except (ValueError, TypeError):
        return
    assert (argument, value > 0) == ("stride", True)  # beyond the map, one output is left


def test_numbers_of_numpy_are_integers():
    numpy = pytest.importorskip("numpy")
    assert torch.equal(direct_conv2d(X, W, stride=numpy.int64(2)), direct_conv2d(X, W, stride=2))


@pytest.mark.parametrize("stride", [8, 9, 2**31, 2**62, 2**63 - 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_stride_beyond_the_map_leaves_one_output(stride, groups):
    x, weight = torch.randn(2, 2, 5, 6), torch.randn(2, 2 // groups, 3, 3)
    wanted = direct_conv2d(x, weight, stride=20, padding=1, groups=groups)
    assert wanted.shape[2:] == (1, 1)
    assert torch.equal(direct_conv2d(x, weight, stride=stride, padding=1, groups=groups), wanted)
    torch.testing.assert_close(wanted, torch.conv2d(x, weight, stride=20, padding=1, groups=groups))


@pytest.mark.parametrize("dilation", [2, 2**31, 2**62, 2**63 - 1])
def test_the_dilation_of_one_tap_says_nothing(dilation):
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(4, 3, 1, 1)
    assert torch.equal(direct_conv2d(x, weight, dilation=dilation), direct_conv2d(x, weight))


@pytest.mark.parametrize("number", [2**20, 2**31, 2**61, 2**62])
def test_padding_that_is_all_there_is(number):
    for stride in (1, number):
        with pytest.raises(ValueError, match="padded by"):
            direct_conv2d(X, W, padding=number, stride=stride)


def test_padding_several_times_the_map_is_still_right():
    for groups in (1, 2):
        weight = torch.randn(2, 2 // groups, 3, 3)
        ours = direct_conv2d(X, weight, padding=40, stride=39, groups=groups)
        torch.testing.assert_close(ours, torch.conv2d(X, weight, padding=40, stride=39, groups=groups))


@pytest.mark.parametrize("eps", [-1.0, -1e-9, float("nan"), float("inf"), None, "1e-5", True])
def test_eps_of_a_norm(eps):
    with pytest.raises((TypeError, ValueError), match=r"`norms\[1\]\.eps` must be"):
        branch_norm_add([MAP, MAP], [None, Norm(eps=eps)])
    from repkern.ops.branch_norm_add import branch_norm_add_flat

    if isinstance(eps, float):
        branch_norm_add([MAP], [Norm(C[0], C[0])])  # the same shapes, which the plan remembers
        with pytest.raises(ValueError, match=r"`eps\[0\]` must be"):
            branch_norm_add_flat([MAP], [C[0]], [C[0]], [], [], [0], [eps], 0)


def test_lists_of_norms_and_layers():
    with pytest.raises(TypeError, match="`branches` must be a list of tensors"):
        branch_norm_add(MAP, [None])
    with pytest.raises(TypeError, match=r"`norms\[0\]` must be a Norm or None, got float"):
        branch_norm_add([MAP], [1.0])
    with pytest.raises(TypeError, match="`norms` must be a list"):
        branch_norm_add([MAP], Norm())
    with pytest.raises(TypeError, match=r"`norms\[0\]\.weight` must be a tensor or None, got list"):
        branch_norm_add([MAP], [Norm([1.0])])
    with pytest.raises(TypeError, match="`layers` must be a list of SqueezeBranches"):
        orepa_squeeze_many(SqueezeBranches(W))
    with pytest.raises(TypeError, match=r"`layers\[1\]` must be a SqueezeBranches, got Tensor"):
        orepa_squeeze_many([SqueezeBranches(W), W])
    with pytest.raises(TypeError, match=r"`identity_reduce` must be True or False"):
        orepa_squeeze(W, identity_reduce=1)


STEP = {"params": [torch.zeros(3)], "grads": [torch.ones(3)], "multipliers": None, "lr": 0.1, "weight_decay": 0.0}
SGD = {**STEP, "momentum_buffers": [torch.zeros(3)], "momentum": 0.9, "dampening": 0.0}
ADAMW = {
    **STEP, "exp_avgs": [torch.zeros(3)], "exp_avg_sqs": [torch.ones(3)], "max_exp_avg_sqs": None,
    "betas": (0.9, 0.99), "eps": 1e-8, "steps": [torch.zeros(())],
}  # fmt: skip
_WRONG = [float("nan"), float("inf"), -float("inf"), None, "0.1", [], 1j, True]


@pytest.mark.parametrize("value", _WRONG, ids=str)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "dampening"])
def test_numbers_of_an_sgd_step(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        grad_mult_sgd_(**{**SGD, name: value})


@pytest.mark.parametrize("value", _WRONG, ids=str)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "betas"])
def test_numbers_of_an_adamw_step(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        grad_mult_adamw_(**{**ADAMW, name: value})


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.9, 0.9), (0.9, None), (1.0, 0.9), (0.9, -0.1), "ab", 0.9])
def test_betas(betas):
    with pytest.raises((ValueError, TypeError), match="betas"):
        grad_mult_adamw_(**{**ADAMW, "betas": betas})


def test_negative_decay_and_momentum():
    for name in ("weight_decay", "momentum"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 0"):
            grad_mult_sgd_(**{**SGD, name: -0.1})


@pytest.mark.parametrize("name", ["params", "grads", "momentum_buffers"])
@pytest.mark.parametrize("value", [torch.zeros(1, 3), [[1.0]], 3], ids=["tensor", "list", "number"])
def test_lists_of_a_step(name, value):
    with pytest.raises(TypeError, match=name):
        grad_mult_sgd_(**{**SGD, name: value})
