"""Every instruction set of the CPU kernels: right on the edges of its tiles, and the same bits for any thread count."""

import pytest
import torch

from repkern import _native, testing
from repkern.ops import OPS, use_backend
from repkern.ops.compose_sequential import samples as compose
from repkern.ops.orepa_squeeze import samples as squeeze
from repkern.ops.orepa_squeeze.layers import pack
from repkern.ops.orepa_squeeze.samples import random_layer
from repkern.testing.inputs import map_tensors

pytestmark = pytest.mark.skipif(_native.why_missing("cpu") is not None, reason="no native module")

# Vectors hold 2 to 16 lanes and panels 2 to 4 vectors: one less than, exactly and one more than each of those.
EDGES = (1, 3, 4, 5, 8, 9, 16, 17, 32, 33, 48, 49, 65)
BRANCHES = ("origin", "avg", "prior", "pointwise", "expand", "project")


def isas():
    names = ["scalar", "avx2", "avx512", "amx"]
    found = _native.native_build_info().get("isa_found", "scalar")
    return [name for name in names[: names.index(found) + 1] if name != "amx"]


@pytest.fixture(params=isas())
def isa(request):
    module = _native.load("cpu")
    before = module.build_info()["isa_used"]
    module.set_isa(request.param)
    yield request.param
    module.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def run(op, args):
    with use_backend("cpu"):
        if not op.mutates:
            return as_list(op(*args))
        changed = map_tensors(args, torch.clone)
        op(*changed)
        return [t for arg in changed if isinstance(arg, list | tuple) for t in arg if isinstance(t, torch.Tensor)]


def check(op_name, sample):
    """Against the reference in float64, in both dtypes."""
    op = OPS[op_name]
    for dtype in (torch.float32, torch.float64):
        args = map_tensors(sample.args, lambda t, dtype=dtype: t.to(dtype))
        wanted = as_list(op.implementation("reference")(*map_tensors(args, testing.as_float)))
        bounds = testing.error_bounds(op, sample, dtype)
        for number, (got, exact, bound) in enumerate(zip(run(op, args), wanted, bounds, strict=True)):
            testing.assert_close(got, exact, bound, f"{op_name} {dtype}, output {number}")


def check_squeeze(*layers):
    check("orepa_squeeze_many", squeeze._forward("edge", list(layers)))
    check("orepa_squeeze_many_backward", squeeze._backward("edge", list(layers)))


@pytest.mark.parametrize("name", list(OPS))
def test_a_machine_with_amx_runs_what_is_written_for_avx512(name):
    module = _native.load("cpu")
    if module.build_info()["isa_found"] != "amx":
        pytest.skip("no AMX here")
    before, results = module.build_info()["isa_used"], []
    args = map_tensors(testing.samples_of(OPS[name])[1].args, lambda t: t.float())
    for level in ("avx512", "amx"):
        module.set_isa(level)
        assert module.build_info()["isa_used"] == level
        results.append(run(OPS[name], args))
    module.set_isa(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("channels", EDGES)
def test_squeeze_at_the_edges_of_tiles(isa, channels):
    other = EDGES[(EDGES.index(channels) + 4) % len(EDGES)]
    check_squeeze(random_layer(channels, other, 3, cm=max(channels - 1, 1), expansion=3))
    check_squeeze(random_layer(other, channels, 1, cm=channels + 1, expansion=1, identity_reduce=False))


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("groups", [1, 3, 20])
def test_squeeze_kernels_and_groups(isa, kernel, groups):
    check_squeeze(random_layer(20 * groups, 2 * groups, kernel, groups=groups, cm=19 * groups, expansion=8))
    check_squeeze(random_layer(groups, 2 * groups, kernel, groups=groups, cm=groups, expansion=2, scale="none"))


@pytest.mark.parametrize("missing", BRANCHES)
def test_squeeze_without_and_with_one_branch(isa, missing):
    check_squeeze(random_layer(35, 6, 3, without=(missing,), scale="compact"))
    if missing in ("origin", "expand"):  # the ones that determine the shape alone
        check_squeeze(random_layer(35, 6, 3, without=[b for b in BRANCHES if b != missing], scale="none"))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_squeeze_writes_what_torch_would_cast_to(isa, out_dtype, channels_last):
    op = OPS["orepa_squeeze_many"]
    layers = [random_layer(ci, 5, 3, cm=9, expansion=2, dtype=torch.float32) for ci in (3, 16, 53)]
    tensors, layout = pack(layers)
    written = run(op, (tensors, layout, out_dtype, channels_last))
    kept = run(op, (tensors, layout, None, False))
    for got, kernel in zip(written, kept, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        # A kernel is summed in another order when channels_last, so one step of the shorter dtype is allowed there.
        step = float(kernel.abs().max()) * torch.finfo(out_dtype).eps if channels_last else 0.0
        assert float((got.double() - kernel.to(out_dtype).double()).abs().max()) <= step + 1e-30


def test_half_rounding_of_extremes(isa):
    values = torch.tensor([0.0, -0.0, 6e-8, 2.9e-8, -6.1e-5, 65504.0, 65519.9, 65520.0, -1e30, 1e-30, float("inf")])
    values = torch.cat([values, torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, float("nan")])])
    tensors, layout = pack([random_layer(16, 1, 1, without=BRANCHES[1:], scale="none", dtype=torch.float32)])
    tensors[0] = values.reshape(1, 16, 1, 1)
    for out_dtype in (torch.float16, torch.bfloat16):
        (got,) = run(OPS["orepa_squeeze_many"], (tensors, layout, out_dtype, False))
        testing.assert_close(got.flatten(), values.to(out_dtype), 0.0, f"{out_dtype}")


@pytest.mark.parametrize("channels", EDGES)
def test_compose_at_the_edges_of_tiles(isa, channels):
    other = EDGES[(EDGES.index(channels) + 5) % len(EDGES)]
    generator = torch.Generator().manual_seed(channels)
    for k1, k2, groups in ((3, 3, 1), (1, 3, 2), (5, 1, 1), (2, 4, 3)):
        case = (channels * groups, max(channels - 1, 1) * groups, other * groups, groups, k1, k2)
        for name in ("compose_sequential", "compose_sequential_backward"):
            check(name, compose._sample(name, case, generator, slow=False))


# In-place ops have this check in test_grad_mult_steps.py.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if not op.mutates])
def test_thread_count_changes_no_bit(isa, threads, name, dtype):
    op = OPS[name]
    for sample in testing.samples_of(op):
        args = map_tensors(sample.args, lambda t: t.to(dtype))
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(run(op, args))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                testing.assert_close(b, a, 0.0, f"{name} {sample} with another thread count")
