"""Every op of the table, on everything this machine can run, against the reference in float64."""

import pytest
import torch

from repkern import testing
from repkern.ops import OPS, use_backend
from repkern.testing.inputs import map_tensors
from repkern.testing.tolerance import error_bounds


def _tensors(args):
    found = []
    map_tensors(args, lambda t: found.append(t) or t)
    return found


# Optimizer steps return nothing and mix dtypes on purpose: python_tests/ops/test_grad_mult_*.py asks the same of them.
RETURNING = [op for op in OPS.values() if not op.mutates]
CASES = [pytest.param(op, sample, id=f"{op.name}-{sample}") for op in RETURNING for sample in testing.samples_of(op)]
QUICK = [case for case in CASES if not case.values[1].slow]
SMALL = [
    pytest.param(op, testing.samples_of(op)[1], id=op.name) for op in RETURNING
]  # the first is 1x1x1, the second is small and odd
PAIRED = [case for case in SMALL if len(_tensors(case.values[1].args)) > 1]  # ops whose tensors can disagree
TARGETS = [pytest.param(target, id=str(target)) for target in testing.targets()]
INTERPRETED = ("simt", "triton")


def skip_unless_written_for(op, target):
    """Ops may be declared for some backends only (`define_op(backends=)`), as direct_conv2d: cuDNN serves GPUs."""
    if target.backend not in op.backends:
        pytest.skip(f"{op.name} has no backend {target.backend}")


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def exact(op, args):
    return as_list(op.implementation("reference")(*map_tensors(args, testing.as_float)))


def cast(args, dtype, device="cpu"):
    return map_tensors(args, lambda t: t.to(device=device, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_matches_float64(op, sample, target, dtype):
    skip_unless_written_for(op, target)
    if sample.slow and target.backend in INTERPRETED and target.device == "cpu":
        pytest.skip("large shapes are for compiled backends")
    args = cast(sample.args, dtype, target.device)
    with target.active():
        outputs = as_list(op(*args))
    bounds = error_bounds(op, sample, dtype)
    for number, (got, wanted, bound) in enumerate(zip(outputs, exact(op, args), bounds, strict=True)):
        assert got.device.type == target.device
        testing.assert_close(got, wanted.cpu(), bound, f"{op.name} {sample} on {target}, output {number}")


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].backend != "reference"])
@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_strided_inputs_give_the_same_bits(op, sample, target):
    skip_unless_written_for(op, target)
    args = cast(sample.args, torch.float32, target.device)
    with target.active():
        plain, strided = as_list(op(*args)), as_list(op(*map_tensors(args, testing.noncontiguous)))
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].backend not in INTERPRETED])
@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_twice_gives_the_same_bits(op, sample, target):
    skip_unless_written_for(op, target)
    args = cast(sample.args, torch.float32, target.device)
    with target.active():
        first, second = as_list(op(*args)), as_list(op(*args))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_nan_goes_through(op, sample):
    poisoned = cast(sample.args, torch.float32)
    _tensors(poisoned)[0].view(-1)[0] = torch.nan
    assert any(bool(output.isnan().any()) for output in as_list(op(*poisoned)))


@pytest.mark.unguarded
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_opcheck(op, sample):
    differentiable = op.differentiable and not op.name.endswith("_backward")
    args = map_tensors(cast(sample.args, torch.float32), lambda t: t.clone().requires_grad_(differentiable))
    if op.name == "orepa_squeeze_many":
        args[0][-1].requires_grad_(False)  # the prior filter
    torch.library.opcheck(op.overload, args)


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_integers_are_refused(op, sample):
    with pytest.raises(TypeError, match=r"float32, float64.*int64|must be one of"):
        op(*map_tensors(sample.args, lambda t: t.long()))


@pytest.mark.parametrize(("op", "sample"), PAIRED)
def test_mixed_dtypes_are_refused(op, sample):
    seen = []

    def first_only(tensor):
        seen.append(tensor)
        return tensor.float() if len(seen) == len(_tensors(sample.args)) else tensor

    with pytest.raises(TypeError, match="one dtype"):
        op(*map_tensors(sample.args, first_only))


@pytest.mark.parametrize(("op", "sample"), PAIRED)
def test_mixed_devices_are_refused(op, sample):
    seen = []

    def last_elsewhere(tensor):
        seen.append(tensor)
        return tensor.to("meta") if len(seen) == len(_tensors(sample.args)) else tensor

    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"device|meta"):
        op(*map_tensors(sample.args, last_elsewhere))


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_wrong_shapes_are_refused(op, sample):
    tensors = _tensors(sample.args)
    refused = 0
    for wrong in range(len(tensors)):
        seen = []

        def cropped(tensor, seen=seen, wrong=wrong):
            seen.append(tensor)
            return tensor[..., :-1] if len(seen) == wrong + 1 else tensor

        with pytest.raises(ValueError, match=r"got|divisible|takes"):
            op(*map_tensors(sample.args, cropped))
        refused += 1
    assert refused == len(tensors)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_vmap_is_right_or_says_it_cannot(op, sample):
    """torch loops over the batch for single tensors; for tensor lists it has no fallback and must say so."""
    tensors = _tensors(sample.args)

    def call(*inner):
        waiting = iter(inner)
        return op(*map_tensors(sample.args, lambda _: next(waiting)))

    try:
        batched = as_list(torch.func.vmap(call)(*[t.expand(2, *t.shape) for t in tensors]))
    except RuntimeError as error:
        if "Batching rule" not in str(error):
            raise
        return
    for got, wanted in zip(batched, as_list(op(*sample.args)), strict=True):
        assert torch.equal(got, wanted.expand(2, *wanted.shape))


def test_a_forced_backend_that_cannot_run_says_why():
    op = OPS["compose_sequential"]
    kernel = torch.zeros(1, 1, 1, 1)
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"'cuda' was asked for but cannot run: it runs on cuda"),
    ):
        op(kernel, kernel, 1)
    with pytest.raises(ValueError, match="'gpu' is unknown"), use_backend("gpu"):
        pass
