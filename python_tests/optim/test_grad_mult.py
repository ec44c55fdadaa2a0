"""GradMult: Eq. 3 of the paper, and what it refuses."""

import copy
import itertools
import pickle

import pytest
import torch

from repkern.optim import GradMult

S, T = torch.tensor([0.5, -2.0, 1.5, -0.25]), torch.tensor([1.0, 3.0, -0.5, -2.0])


def written_out(shape, per_entry, at_centre, diagonal, groups):
    """The cases of Eq. 3, entry by entry."""
    full = torch.empty(shape)
    for c, d, p, q in itertools.product(*map(range, shape)):
        value = per_entry[c]
        if p == shape[2] // 2 and q == shape[3] // 2:
            value = value + at_centre[c]
            first_of_group = c // (shape[0] // groups) * shape[1]
            if diagonal and first_of_group + d == c:
                value = value + 1
        full[c, d, p, q] = value
    return full


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 4, 3, 3), 1), ((4, 2, 5, 5), 2), ((4, 1, 3, 3), 4), ((4, 4, 1, 1), 1)]
)
def test_dense(shape, groups, identity):
    mult = GradMult(S, T, identity, groups)
    assert torch.equal(mult.dense(shape), written_out(shape, S**2, T**2, identity, groups))
    assert torch.equal(mult.dense(shape, power=1), written_out(shape, S.abs(), T.abs(), identity, groups))
    assert torch.equal(mult.dense(shape, power=1, released=True), written_out(shape, S, T, identity, groups))
    without = GradMult(S, None, identity, groups)
    assert torch.equal(without.dense(shape), written_out(shape, S**2, torch.zeros(4), identity, groups))


def test_values_are_copies_and_do_not_change():
    scale = S.clone().requires_grad_()
    mult = GradMult(scale, T)
    with torch.no_grad():
        scale.zero_()
    assert torch.equal(mult.conv_scale, S)
    assert not mult.conv_scale.requires_grad
    with pytest.raises(AttributeError, match="does not change; make a new one to set groups"):
        mult.groups = 2
    assert GradMult([1, 2]).conv_scale.dtype is torch.float32
    assert GradMult(S.bfloat16()).conv_scale.dtype is torch.float32


def test_equality_copies_and_representation():
    mult = GradMult(S, T, True, 2)
    assert mult == GradMult(S, T, True, 2)
    for other in (
        GradMult(S, T, True),
        GradMult(S, T, False, 2),
        GradMult(S, None, True, 2),
        GradMult(S, S, True, 2),
        3,
    ):
        assert mult != other
    for again in (copy.deepcopy(mult), pickle.loads(pickle.dumps(mult)), GradMult.from_dict(mult.to_dict())):
        assert again == mult
    assert repr(mult) == "GradMult([4] conv_scale=-2..1.5, pointwise_scale=-2..3, identity=True, groups=2)"
    with pytest.raises(ValueError, match=r"a GradMult is conv_scale, .*, got conv_scale"):
        GradMult.from_dict({"conv_scale": S})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([1.0, torch.nan]),), ValueError, "conv_scale is nan for channel 1"),
        (([1.0, 1.0], [torch.inf, 1.0]), ValueError, "pointwise_scale is inf for channel 0"),
        (([1.0, 0.0],), ValueError, "conv_scale is 0 for channel 1: its kernel would never change"),
        (([1.0, 1.0], [1.0]), ValueError, r"pointwise_scale must be \[2\], as conv_scale, got \[1\]"),
        ((torch.ones(2, 1),), ValueError, r"conv_scale must be a vector .*, got shape \(2, 1\)"),
        (([],), ValueError, r"conv_scale must be a vector .*, got shape \(0,\)"),
        (
            (torch.ones(2, dtype=torch.complex64),),
            TypeError,
            r"conv_scale must hold real numbers, got torch\.complex64",
        ),
        (([1.0], None, 0.5), TypeError, r"identity must be True or False .*, got 0\.5"),
        (([1.0, 1.0, 1.0], None, False, 2), ValueError, "groups must divide the 3 channels, got 2"),
    ],
)
def test_what_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        GradMult(*arguments)


@pytest.mark.parametrize(
    ("mult", "shape", "message"),
    [
        (GradMult(S), (5, 4, 3, 3), r"conv_scale has 4 channels, but the weight \(5, 4, 3, 3\) has 5 outputs"),
        (GradMult(S), (4, 4), r"for the weight \[Co, Ci/g, K, K\] of a convolution, got \(4, 4\)"),
        (GradMult(S, T), (4, 4, 2, 2), r"a kernel with a centre \(odd and square\), got \(4, 4, 2, 2\)"),
        (GradMult(S, T, True), (4, 3, 3, 3), r"3 inputs x 1 groups in \(4, 3, 3, 3\) are not 4"),
    ],
)
def test_weights_it_is_not_for(mult, shape, message):
    with pytest.raises(ValueError, match=message):
        mult.check(shape)


def test_powers():
    with pytest.raises(ValueError, match=r"power must be 2 \(SGD\) or 1 \(AdamW\), got 3"):
        GradMult(S).parts(3)
