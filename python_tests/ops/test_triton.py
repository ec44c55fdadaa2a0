"""The Triton kernels beyond the op-level checks of test_all_ops.py: many tiles, launches, code for real GPUs.

Without a GPU they run in Triton's interpreter, which conftest.py turns on.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from repkern import testing
from repkern.ops import OPS, _select, use_backend, winograd_conv2d
from repkern.ops._sample import Sample
from repkern.ops.orepa_squeeze import samples as squeeze_samples
from repkern.ops.orepa_squeeze.layers import pack
from repkern.ops.orepa_squeeze.samples import random_layer
from repkern.ops.winograd_conv2d import samples as winograd_samples
from repkern.testing.inputs import map_tensors
from repkern.testing.tolerance import error_bounds

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD, BACKWARD = "orepa_squeeze_many", "orepa_squeeze_many_backward"
# In float32 all extents pass 64, the largest tile; 144 rows are enough for d_reduce to be summed in parts.
WIDE = {
    "one_group": {"ci": 70, "co": 16, "cm": 66, "expansion": 2},
    "two_groups": {"ci": 132, "co": 36, "cm": 4, "groups": 2, "expansion": 1, "identity_reduce": False},
}


def run(op, args):
    with use_backend("triton"):
        outputs = op(*map_tensors(args, lambda t: t.to(DEVICE)))
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def check(op, sample, dtype):
    """`op` on Triton against the reference in float64, everywhere within the computed bounds."""
    args = map_tensors(sample.args, lambda t: t.to(dtype))
    outputs = run(op, args)
    sample = dataclasses.replace(sample, args=map_tensors(args, testing.as_float))
    exact = op.implementation("reference")(*sample.args)
    exact = [exact] if isinstance(exact, torch.Tensor) else exact
    for number, (got, wanted, bound) in enumerate(zip(outputs, exact, error_bounds(op, sample, dtype), strict=True)):
        testing.assert_close(got, wanted, bound, f"{op.name} {sample}, output {number}")
    return outputs


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", WIDE)
def test_squeeze_over_many_tiles(case, channels_last):
    sample = squeeze_samples._forward(case, [random_layer(k=3, **WIDE[case])], channels_last=channels_last)
    (kernel,) = check(OPS[FORWARD], sample, torch.float32)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert kernel.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("case", WIDE)
def test_squeeze_gradients_over_many_tiles(case):
    check(OPS[BACKWARD], squeeze_samples._backward(case, [random_layer(k=3, **WIDE[case])]), torch.float32)


def test_squeeze_gradients_over_many_tiles_in_float64():
    layer = random_layer(18, 17, 3, cm=23, expansion=2)
    check(OPS[BACKWARD], squeeze_samples._backward("float64", [layer]), torch.float64)


def grads_as(layers, change):
    """A backward sample whose gradients went through `change`, exactly representable as float16."""
    sample = squeeze_samples._backward("", layers)
    grads, tensors, layout = sample.args
    return Sample("", ([change(grad.half().double()) for grad in grads], tensors, layout), sample.lengths)


@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.half(),
        lambda grad: grad.float().to(memory_format=torch.channels_last),
        lambda grad: grad.float()[:1, :1, :1, :1].expand_as(grad),
        lambda grad: grad.float().transpose(2, 3),
    ],
    ids=["half", "channels_last", "expanded", "transposed"],
)
def test_gradients_are_read_as_they_lie(change):
    op = OPS[BACKWARD]
    sample = grads_as([random_layer(7, 6, 3, expansion=2), random_layer(5, 6, 1, expansion=1)], change)
    grads, tensors, layout = sample.args
    outputs = run(op, (grads, [t.float() for t in tensors], layout))
    sample = Sample("", map_tensors(sample.args, lambda t: t.float().double()), sample.lengths)
    exact = op.implementation("reference")(*sample.args)
    for got, wanted, bound in zip(outputs, exact, error_bounds(op, sample, torch.float32), strict=True):
        testing.assert_close(got, wanted, bound)


def test_gradients_of_mixed_dtypes():
    op = OPS[BACKWARD]
    layers = [random_layer(3, 4, 3, expansion=1, dtype=torch.float32) for _ in range(2)]
    grads = [torch.randn(4, 3, 3, 3).half(), torch.randn(4, 3, 3, 3)]
    mixed = run(op, (grads, *pack(layers)))
    plain = run(op, ([grad.float() for grad in grads], *pack(layers)))
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain, strict=True))


def test_the_same_bits_alone_and_among_others():
    """A layer's sums do not depend on what shares its launch, nor on the run."""
    layers = [random_layer(9, 8, 3, expansion=2, dtype=torch.float32) for _ in range(3)]
    grads = [torch.randn(8, 9, 3, 3) for _ in layers]
    together = run(OPS[BACKWARD], (grads, *pack(layers)))
    alone = [g for grad, layer in zip(grads, layers, strict=True) for g in run(OPS[BACKWARD], ([grad], *pack([layer])))]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


class Counting:
    """A kernel that counts its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


def test_layers_of_like_size_share_launches(monkeypatch):
    from repkern.ops.orepa_squeeze import triton_kernels

    launches = []
    for name in ("forward_kernel", "expand_kernel", "reduce_kernel", "rest_kernel", "sum_kernel"):
        monkeypatch.setattr(triton_kernels, name, Counting(getattr(triton_kernels, name), launches))
    layers = [random_layer(4, 5, 3, expansion=1, dtype=torch.float32) for _ in range(5)]
    run(OPS[FORWARD], (*pack(layers), None, False))
    assert len(launches) == 1
    run(OPS[BACKWARD], ([torch.randn(5, 4, 3, 3) for _ in layers], *pack(layers)))
    assert len(launches) == 1 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compose_over_many_tiles(dtype):
    first, second = torch.randn(36, 5, 3, 3).double(), torch.randn(132, 18, 2, 2).double()
    grad = torch.randn(132, 5, 4, 4).double()
    check(OPS["compose_sequential"], Sample("", (first, second, 2), (18 * 4,)), dtype)
    if dtype is torch.float32:
        sample = Sample("", (grad, first, second, 2), (66 * 4, 5 * 9))
        check(OPS["compose_sequential_backward"], sample, dtype)


@pytest.mark.parametrize("case", [
    {"n": 1, "c": 132, "k": 70, "h": 17, "w": 18, "residual": True},
    {"n": 3, "c": 18, "k": 34, "h": 5, "w": 18, "groups": 2, "channels_last": True, "activation": "hardswish"},
])  # fmt: skip
def test_winograd_over_many_programs_and_chunks(case, monkeypatch):
    """More than 64 outputs or tiles and 128 channels, and the same bits however the tiles are cut into chunks."""
    from repkern.ops.winograd_conv2d import triton

    case = winograd_samples._Case(tile=2, **case)
    sample = winograd_samples._conv(case, lambda *shape: torch.randn(*shape, dtype=torch.float64))
    (whole,) = check(OPS["winograd_conv2d_packed"], sample, torch.float32)
    monkeypatch.setattr(triton, "_WORKSPACE_BYTES", 1)
    (cut,) = run(OPS["winograd_conv2d_packed"], map_tensors(sample.args, torch.Tensor.float))
    assert torch.equal(cut, whole)
    assert whole.is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)


def winograd_error(dtype, tile, **options):
    """Relative L2 against float64."""
    x, weight = torch.randn(2, 35, 9, 11).to(DEVICE, dtype), torch.randn(37, 35, 3, 3).to(DEVICE, dtype) / 18
    residual = torch.randn(2, 37, 9, 11).to(DEVICE, dtype)
    with use_backend("triton"):
        got = winograd_conv2d(x, weight, residual=residual, tile=tile, **options)
    assert got.dtype == dtype
    wanted = functional.conv2d(x.double(), weight.double(), padding=1) + residual.double()
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "tile", "allowed"), [
    (torch.float16, 2, 8e-4), (torch.float16, 4, 2.5e-3), (torch.bfloat16, 2, 6e-3),
])  # fmt: skip
def test_winograd_of_half_maps(dtype, tile, allowed):
    assert winograd_error(dtype, tile) <= allowed


@pytest.mark.parametrize(("tile", "allowed"), [(2, 8e-4), (4, 2.5e-3)])
def test_winograd_rounds_to_tf32_only_when_torch_may(tile, allowed, monkeypatch):
    assert winograd_error(torch.float32, tile) <= 3e-6
    monkeypatch.setattr("repkern.ops._check.allow_tf32", lambda: True)
    assert 1e-5 <= winograd_error(torch.float32, tile) <= allowed


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, for inf - inf
@pytest.mark.parametrize("tf32", [False, True])
def test_winograd_keeps_nan_and_infinity(tf32, monkeypatch):
    monkeypatch.setattr("repkern.ops._check.allow_tf32", lambda: tf32)
    x = torch.ones(1, 3, 8, 8)
    x[0, 1, 1, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x[0, 2, 6, 6] = torch.inf
    with use_backend("triton"):
        y = winograd_conv2d(x.to(DEVICE), torch.ones(2, 3, 3, 3).to(DEVICE), activation="relu", tile=4).cpu()
    wanted = functional.conv2d(x, torch.ones(2, 3, 3, 3), padding=1)
    assert not y[~wanted.isfinite()].isfinite().any()
    assert y[:, :, :4, 4:].isfinite().all()


def test_tf32_is_used_only_when_torch_may(monkeypatch):
    from repkern.ops import _triton

    assert _triton.dot_precision(torch.float32) == "ieee"
    monkeypatch.setattr("repkern.ops._check.allow_tf32", lambda: True)
    assert _triton.dot_precision(torch.float64) == "none"
    assert _triton.dot_precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is off where there is a GPU")
def test_the_interpreter_refuses_gpu_tensors_and_cpu_tensors_need_it(monkeypatch):
    from repkern.ops import _triton

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 runs CPU tensors only, got cuda:0"):
        _triton.on_device(torch.device("cuda:0"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "set TRITON_INTERPRET=1" in _select.why_not.__wrapped__("triton", "cpu")


COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from repkern.ops.compose_sequential.triton_kernels import product_over_positions_kernel
from repkern.ops.orepa_squeeze import triton_kernels as squeeze


def build(kernel, target, pointers=("table",), pointer="*i64", **constants):
    types = {n: "constexpr" if n in constants else pointer if n in pointers else "i32" for n in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = compile(ASTSource(kernel, types, values), target=target, options={"num_warps": 8, "num_stages": 2})
    assert compiled.metadata.shared <= 48 * 1024, (kernel, target, compiled.metadata.shared)


for target, dtype, precision, side, step in (
    (GPUTarget("cuda", 80, 32), tl.float32, "ieee", 64, 16),
    (GPUTarget("cuda", 90, 32), tl.float32, "tf32", 64, 32),
    (GPUTarget("cuda", 90, 32), tl.float64, "none", 16, 16),
    (GPUTarget("hip", "gfx942", 64), tl.float32, "ieee", 64, 16),
):
    common = {"LAYERS": 4, "DTYPE": dtype}
    product = common | {"PRECISION": precision, "STEP": step}
    build(squeeze.forward_kernel, target, OUT_DTYPE=tl.bfloat16, ROWS=side, INPUTS=side, **product)
    build(squeeze.expand_kernel, target, GRAD_DTYPE=tl.bfloat16, ROWS=side, INTERNAL=side, **product)
    build(squeeze.reduce_kernel, target, GRAD_DTYPE=tl.bfloat16, INTERNAL=side, INPUTS=side, **product)
    build(squeeze.rest_kernel, target, GRAD_DTYPE=dtype, OUTPUTS=16, INPUTS=64, **common)
    build(squeeze.sum_kernel, target, SUMS=4, DTYPE=dtype, BLOCK=256)
    build(
        product_over_positions_kernel, target, ("a", "b", "out"), f"*{dtype}",
        SIGN=-1, DTYPE=dtype, PRECISION=precision, M=side, N=side, K=step,
    )
"""


COMPILE_STEPS = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from repkern.ops.grad_mult_adamw.triton_kernels import adamw_kernel
from repkern.ops.grad_mult_sgd.triton_kernels import sgd_kernel

OF = {"numbers": "*fp64", "constants": "*fp64", "chunks": "*i32", "grad_scale": "*fp32", "found_inf": "*fp32"}


def build(kernel, target, **constants):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    of = OF | {"addresses": "*i64", "shapes": "*i64", "count": "i32"}
    types = {n: "constexpr" if n in constants else of[n] for n in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compile(ASTSource(kernel, types, values), target=target, options={"num_warps": 4})


for target, stored, wide, flag in (
    (GPUTarget("cuda", 80, 32), tl.float16, tl.float32, True),
    (GPUTarget("cuda", 90, 32), tl.float32, tl.float32, False),
    (GPUTarget("cuda", 90, 32), tl.float64, tl.float64, True),
    (GPUTarget("hip", "gfx942", 64), tl.bfloat16, tl.float32, True),
):
    common = {"X": stored, "T": wide, "SCALED": flag, "CHECKED": flag, "BLOCK": 1024}
    build(sgd_kernel, target, MOVES=True, NESTEROV=flag, **common)
    build(adamw_kernel, target, AMSGRAD=flag, DECOUPLED=flag, MULTIPLY_UPDATE=flag, **common)
"""


COMPILE_NORMS = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from repkern.ops.branch_norm_add import triton_kernels as norm

MAPS, PARAMETERS = ("out", "grad", "as_is"), ("grad_weight", "grad_bias")
INTEGERS = ("channels", "plane", "positions", "splits", "per_split", "branches", "norms")


def build(kernel, target, dtype, wide, **constants):
    constants = {"DTYPE": dtype, "WIDE": wide, "PARAM": wide, "STORED": dtype, **constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    of = {name: "i32" for name in INTEGERS} | {name: f"*{dtype}" for name in MAPS} | {"table": "*i64"}
    if kernel is norm.merge_sums_kernel:
        of["count"] = "i32"
    types = {n: "constexpr" if n in constants else of.get(n, f"*{wide}") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = compile(ASTSource(kernel, types, values), target=target, options={"num_warps": 4})
    assert compiled.metadata.shared <= 48 * 1024, (kernel, target, compiled.metadata.shared)


for target, dtype, wide, channels_last, activation in (
    (GPUTarget("cuda", 80, 32), tl.float16, tl.float32, False, 4),
    (GPUTarget("cuda", 90, 32), tl.float32, tl.float32, True, 1),
    (GPUTarget("cuda", 90, 32), tl.float64, tl.float64, False, 3),
    (GPUTarget("hip", "gfx942", 64), tl.bfloat16, tl.float32, True, 2),
):
    shape = {"POS": 16, "CH": 64} if channels_last else {"POS": 1024, "CH": 1}
    common = {"CHANNELS_LAST": channels_last, "ACTIVATION": activation, "HAS_AS_IS": True, "ROWS": 4, "BLOCK": 128}
    for name in ("moments", "sum", "sums", "gradients", "statistics_backward"):
        build(getattr(norm, f"{name}_kernel"), target, dtype, wide, **common, **shape)
    for name in ("merge_moments", "coefficients", "merge_sums", "slopes"):
        build(getattr(norm, f"{name}_kernel"), target, dtype, wide, **common, CH=128)
"""


COMPILE_WINOGRAD = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from repkern.ops.winograd_conv2d import triton_kernels as winograd
from repkern.ops.winograd_conv2d.matrices import matrices
from repkern.ops.winograd_conv2d.triton import _VALUES, _flat

MAPS, WIDES = ("weight", "x", "v", "residual", "out"), ("packed", "product", "bias")


def build(kernel, target, dtype, wide, warps=4, **constants):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    of = {name: f"*{dtype}" for name in MAPS} | {name: f"*{wide}" for name in WIDES}
    types = {n: "constexpr" if n in constants else of.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = compile(ASTSource(kernel, types, values), target=target, options={"num_warps": warps, "num_stages": 2})
    assert compiled.metadata.shared <= 48 * 1024, (kernel, target, compiled.metadata.shared)


# Triton makes constants of integer arguments that are 1, and None is one.
ONES = ("total", "count", "groups", "channels", "inputs", "outputs", "height", "width", "rows", "columns", "padding")
ONES = dict.fromkeys(ONES, 1) | {"bias": None, "residual": None, "HAS_BIAS": False, "HAS_RESIDUAL": False}
for target, dtype, wide, m, precision, last, tiles, step, more in (
    (GPUTarget("cuda", 80, 32), tl.float16, tl.float32, 2, "ieee", True, 128, 32, {}),
    (GPUTarget("cuda", 90, 32), tl.float32, tl.float32, 4, "ieee", False, 64, 16, {}),
    (GPUTarget("cuda", 80, 32), tl.float32, tl.float32, 5, "tf32", False, 64, 32, {}),
    (GPUTarget("cuda", 90, 32), tl.float32, tl.float32, 6, "tf32", True, 128, 32, {}),
    (GPUTarget("cuda", 90, 32), tl.float64, tl.float64, 2, "none", False, 16, 16, {}),
    (GPUTarget("cuda", 90, 32), tl.bfloat16, tl.float32, 2, "ieee", False, 16, 32, ONES),
    (GPUTarget("hip", "gfx942", 64), tl.bfloat16, tl.float32, 2, "ieee", False, 128, 32, {}),
):
    own = matrices(m)
    common = {"R": m + 2, "P": (m + 2) ** 2, "A": _flat(own.a), "B": _flat(own.b), "G": _flat(own.g), "WIDE": wide}
    common |= {"DTYPE": dtype, "PRECISION": precision, "CHAIN": 128, "ACTIVATION": 1 + m // 2, "BLOCK": _VALUES[m]}
    common |= {"HAS_BIAS": True, "HAS_RESIDUAL": True, "CHANNELS_LAST": last, **more}
    channels = 64 if last else 1
    for kernel in (winograd.weight_kernel, winograd.input_kernel, winograd.output_kernel):
        build(kernel, target, dtype, wide, **common, TILES=_VALUES[m] // channels, CHANNELS=channels)
    outputs = 16 if tiles == 16 else 64
    build(winograd.product_kernel, target, dtype, wide, 8, **common, TILES=tiles, OUTPUTS=outputs, STEP=step)
"""


@pytest.mark.parametrize(
    "source", [COMPILE, COMPILE_NORMS, COMPILE_STEPS, COMPILE_WINOGRAD], ids=["kernels", "norms", "steps", "winograd"]
)
def test_every_kernel_compiles_for_gpus(tmp_path, source):
    """Triton's compiler needs no GPU: what the interpreter accepts but a GPU cannot run fails here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "compile_all.py"  # a file, since Triton reads the source of what it compiles
    root = Path(_select.__file__).parents[2]
    script.write_text(f"import sys\n\nsys.path.insert(0, {str(root)!r})\n{source}")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
