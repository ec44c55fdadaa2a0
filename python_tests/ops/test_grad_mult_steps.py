"""Both optimizer steps, on everything this machine can run: what test_all_ops.py asks of ops that return something."""

import pytest
import torch

from repkern import testing
from repkern.ops import OPS, _grad_mult_tables
from repkern.ops._grad_mult_samples import cast
from repkern.testing.inputs import map_tensors
from repkern.testing.tolerance import unit_roundoff

STEPS = [op for op in OPS.values() if op.mutates]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TARGETS = [pytest.param(target, id=str(target)) for target in testing.targets()]
NATIVE = [t for t in TARGETS if t.values[0].backend not in ("reference", "triton")]
CASES = [pytest.param(op, sample, id=f"{op.name}-{sample}") for op in STEPS for sample in testing.samples_of(op)]
SMALL = [pytest.param(op, testing.samples_of(op)[1], id=op.name) for op in STEPS]
ODD = [pytest.param(op, testing.samples_of(op)[4], id=op.name) for op in STEPS]


def short(dtype):
    return str(dtype).removeprefix("torch.")


def results(op, args, target):
    with target.active(), torch.no_grad():
        op(*args)
    return [t for at in op.mutates for t in args[at]]


def expected(op, args):
    exact = map_tensors(args, lambda t: t.to("cpu", torch.float64, copy=True))
    op.implementation("reference")(*exact)
    return [t for at in op.mutates for t in exact[at]]


def storage_error(op, args, exact, bounds):
    """Bounds with the last rounding of parameters in half precision."""
    halves = [t.dtype for t in args[0]]
    answer = list(bounds)
    for at, dtype in enumerate(halves):
        if dtype in (torch.bfloat16, torch.float16):
            answer[at] = bounds[at] + unit_roundoff(dtype) * (exact[at].abs() + bounds[at]) + torch.finfo(dtype).tiny
    return answer


def check(op, sample, target, dtype):
    args = cast(sample.args, dtype, target.device)
    doubles = map_tensors(args, lambda t: t.double().cpu())
    wanted = expected(op, args)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    bounds = [bound + 16 * torch.finfo(wide).tiny for bound in sample.bounds(doubles, wide)]
    got = results(op, args, target)
    counted = len(got) - len(bounds)
    if counted:  # the numbers of steps are exact
        start = len(got) - counted
        assert [t.item() for t in got[start:]] == [t.item() for t in wanted[start:]]
        got, wanted = got[:start], wanted[:start]
    bounds = storage_error(op, args, wanted, bounds)
    for number, (a, b, bound) in enumerate(zip(got, wanted, bounds, strict=True)):
        testing.assert_close(a, b, bound, f"{op.name} {sample} on {target}, tensor {number}")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_matches_float64(op, sample, target, dtype):
    check(op, sample, target, dtype)


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize(("op", "sample"), ODD)
def test_chunks_may_end_anywhere(op, sample, target, monkeypatch):
    sizes = dict.fromkeys(_grad_mult_tables.CHUNK_SIZE, 20)
    monkeypatch.setattr(_grad_mult_tables, "CHUNK_SIZE", sizes)
    check(op, sample, target, torch.float32)


def guarded(tensor, odd):
    """The same numbers and strides between NaN, `odd` elements behind an aligned address; and a check for later."""
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    raw = torch.full((size + 64,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    inside = raw.as_strided(tensor.shape, tensor.stride(), 16 + odd)
    inside.copy_(tensor)
    return inside, lambda: bool(raw[: 16 + odd].isnan().all()) and bool(raw[16 + odd + size :].isnan().all())


@pytest.mark.parametrize("odd", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "sample"), ODD)
def test_unaligned_parameters_give_the_same_bits_and_nothing_else_is_written(op, sample, target, odd):
    if target.backend == "triton" and odd > 1:
        pytest.skip("one offset is enough for the interpreter")
    args = cast(sample.args, torch.float32, target.device)
    plain = results(op, cast(args, torch.float32, target.device), target)
    checks = []

    def shifted(tensor):
        inside, intact = guarded(tensor, odd)
        checks.append(intact)
        return inside

    moved = results(op, map_tensors(args, shifted), target)
    assert all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))
    assert all(intact() for intact in checks)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].backend != "reference"])
@pytest.mark.parametrize(("op", "sample"), ODD)
def test_strided_arguments_give_the_same_numbers(op, sample, target):
    """Rows apart in memory, and gradients and states in another order than their parameter."""
    args = cast(sample.args, torch.float64, target.device)
    wanted = expected(op, args)

    def other_order(tensor):
        if tensor.dim() != 4:
            return testing.noncontiguous(tensor) if tensor.dim() else tensor
        last = tensor.is_contiguous(memory_format=torch.channels_last)
        return tensor.clone(memory_format=torch.contiguous_format if last else torch.channels_last)

    for change in (testing.noncontiguous, other_order):
        moved = list(map_tensors(args, lambda t: t.clone()))
        for at, value in enumerate(moved):
            if (
                isinstance(value, list)
                and value
                and isinstance(value[0], torch.Tensor)
                and (change is not other_order or at)
            ):
                moved[at] = [change(t) for t in value]
        for got, exact in zip(results(op, tuple(moved), target), wanted, strict=True):
            torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].backend in ("cpu", "cuda")])
@pytest.mark.parametrize(("op", "sample"), ODD)
def test_every_number_of_threads_gives_the_same_bits(op, sample, target, monkeypatch):
    sizes = dict.fromkeys(_grad_mult_tables.CHUNK_SIZE, 64)
    monkeypatch.setattr(_grad_mult_tables, "CHUNK_SIZE", sizes)
    answers = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        answers.append(results(op, cast(sample.args, torch.float32, target.device), target))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in STEPS])
def test_dtypes_mix_in_one_call(op, target):
    sample = testing.samples_of(op)[1]
    lists = [list(map_tensors(cast(sample.args, dtype, target.device), lambda t: t)) for dtype in DTYPES]
    alone = [results(op, map_tensors(tuple(args), torch.clone), target) for args in lists]
    joined = []
    for values in zip(*lists, strict=True):
        joined.append([v for part in values for v in part] if isinstance(values[0], list) else values[0])
    results(op, tuple(joined), target)
    start = [0] * len(joined)
    for args, wanted in zip(lists, alone, strict=True):
        got = []
        for at in op.mutates:
            got += joined[at][start[at] : start[at] + len(args[at])]
            start[at] += len(args[at])
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "sample"), ODD)
def test_gradients_and_multipliers_stay_and_versions_go_up(op, sample, target):
    args = cast(sample.args, torch.float32, target.device)
    before = map_tensors(args, torch.clone)
    versions = [t._version for at in op.mutates for t in args[at]]
    results(op, args, target)
    for at, value in enumerate(args):
        if at not in op.mutates and isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            assert all(torch.equal(a, b) for a, b in zip(value, before[at], strict=True))
    assert all(t._version > v for t, v in zip([t for at in op.mutates for t in args[at]], versions, strict=True))


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_infinity_leaves_every_bit_on_every_backend(op, sample):
    for case in TARGETS:
        (target,) = case.values
        args = cast(sample.args, torch.float32, target.device)
        args[1][0].view(-1)[0] = torch.inf
        args = (*args[:-1], torch.ones(1, device=target.device))
        before = map_tensors(args, torch.clone)
        results(op, args, target)
        for at in op.mutates:
            assert all(torch.equal(a, b) for a, b in zip(args[at], before[at], strict=True)), target


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_nan_stays_where_it_is(op, sample, target):
    args = cast(sample.args, torch.float32, target.device)
    args[1][0].view(-1)[3] = torch.nan
    results(op, args, target)
    for at in op.mutates:
        first = args[at][0]
        if first.dim() > 1:
            assert first.isnan().nonzero().tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("order", ["reverse", "random1"])
@pytest.mark.parametrize(("op", "sample"), ODD)
def test_every_order_of_lanes_gives_the_same_bits(op, sample, order, monkeypatch):
    target = testing.Target("simt", "cpu")
    if not any(case.values[0] == target for case in TARGETS):
        pytest.skip("this is not a test build (install with REPKERN_SIMT=on)")
    plain = results(op, cast(sample.args, torch.float32), target)
    monkeypatch.setenv("REPKERN_SIMT_ORDER", order)
    other = results(op, cast(sample.args, torch.float32), target)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_opcheck(op, sample):
    torch.library.opcheck(op.overload, cast(sample.args, torch.float32))


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_gradients_are_refused(op, sample):
    args = cast(sample.args, torch.float32)
    args[0][0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"has no gradient; call it under torch.no_grad"):
        op(*args)
    with torch.no_grad():
        op(*args)


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_integers_are_refused(op, sample):
    with pytest.raises(TypeError, match=r"`params\[0\]` must be one of float32.*got int64"):
        op(*map_tensors(sample.args, lambda t: t.long()))


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_each_wrong_tensor_is_named(op, sample):
    args = cast(sample.args, torch.float32)
    for at, value in enumerate(args):
        if not (isinstance(value, list) and value and isinstance(value[0], torch.Tensor)):
            continue
        for wrong, error, text in (
            (value[0][..., None].expand(*value[0].shape, 2).clone(), ValueError, r"shape|element|\[Co"),
            (value[0].to("meta"), ValueError, r"is on (meta|cpu) but"),
            (value[0].half(), TypeError, r"must be"),
        ):
            broken = list(args)
            broken[at] = [wrong, *value[1:]]
            with pytest.raises(error, match=text), torch.no_grad():
                op(*broken)


@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_lists_of_different_lengths_are_refused(op, sample):
    args = cast(sample.args, torch.float32)
    for at, value in enumerate(args):
        if isinstance(value, list) and value:
            broken = list(args)
            broken[at] = value[:-1]
            with pytest.raises(ValueError, match=r"parameters, but|are needed, got"), torch.no_grad():
                op(*broken)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("op", "sample"), SMALL)
def test_sparse_gradients_and_shared_memory_are_refused(op, sample):
    args = cast(sample.args, torch.float32)
    for layout in (torch.sparse_coo, torch.sparse_csr):
        grads = [args[1][0][0, 0].to_sparse(layout=layout), args[1][1]]
        with pytest.raises(TypeError, match=r"`grads\[0\]` must be dense.*no sparse gradients"), torch.no_grad():
            op(args[0], grads, *args[2:])
    twice = tuple([v[0], v[0]] if isinstance(v, list) and len(v) == 2 else v for v in args[:3])
    with pytest.raises(ValueError, match=r"params\[1\]` is in the list twice"), torch.no_grad():
        op(*twice, *args[3:])
