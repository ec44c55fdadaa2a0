"""winograd_conv2d on the host executor: both paths, every arithmetic, several chunks, awkward pointers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from repkern import testing
from repkern.ops import OPS, use_backend, winograd_conv2d, winograd_conv2d_packed, winograd_pack_weight
from repkern.ops._select import why_not
from repkern.ops.winograd_conv2d import reference
from repkern.ops.winograd_conv2d.contract import is_transformed
from repkern.ops.winograd_conv2d.matrices import matrices
from repkern.ops.winograd_conv2d.samples import _SLOPE
from repkern.testing import Sample, error_bounds
from repkern.testing.inputs import as_float, map_tensors

pytestmark = pytest.mark.skipif(
    why_not("simt", "cpu") is not None, reason=f"no host build of the kernels: {why_not('simt', 'cpu')}"
)

ORDERS = ("forward", "reverse", "random1", "random2")
PATHS = ("fused", "chunked")
FORMATS = [torch.contiguous_format, torch.channels_last]
OP = OPS["winograd_conv2d_packed"]
TILE = 5  # where samples hold the tile
SAMPLES = [sample for sample in testing.samples_of(OP) if not sample.slow]
QUICK = [pytest.param(sample, id=str(sample)) for sample in SAMPLES]
SMALL_TILES = [pytest.param(sample, id=str(sample)) for sample in SAMPLES if sample.args[TILE] == 2]
TF32_ROUNDOFF = 2.0**-11


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """What a user sets."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def run(sample: Sample, dtype: torch.dtype = torch.float32) -> Tensor:
    with use_backend("simt"):
        return OP(*map_tensors(sample.args, lambda t: t.to(dtype)))


def exact(sample: Sample) -> Tensor:
    return OP.implementation("reference")(*map_tensors(sample.args, lambda t: as_float(t.float())))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sample", SMALL_TILES)
def test_both_paths_in_every_lane_order(sample: Sample, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPKERN_WINOGRAD_CUDA", path)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("REPKERN_SIMT_ORDER", order)
        results.append(run(sample))
    testing.assert_close(results[0], exact(sample), error_bounds(OP, sample, torch.float32)[0], f"{sample}, {path}")
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_paths_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = maps(1, 40, 6, 7).float(), maps(20, 40, 3, 3, seed=1).float()
    results = []
    for path in PATHS:
        monkeypatch.setenv("REPKERN_WINOGRAD_CUDA", path)
        with use_backend("simt"):
            results.append(winograd_conv2d(x, weight, tile=2))
    assert not torch.equal(*results)


@pytest.mark.parametrize("sample", QUICK)
def test_tf32_rounds_both_factors(sample: Sample) -> None:
    x, packed, _, _, outputs, tile, padding, groups, _ = sample.args
    if not is_transformed(packed):
        packed = reference.winograd_transform_weight(reference.unpack_weight(packed, outputs), tile, groups)
    own = matrices(tile)
    size = reference.tiled_product(x.abs(), packed.abs(), own.a.abs(), own.b.abs(), outputs, padding, groups, 1)
    bound = error_bounds(OP, sample, torch.float32)[0] + _SLOPE * (2 * TF32_ROUNDOFF + TF32_ROUNDOFF**2) * size
    with tf32(True):
        got = run(sample)
    testing.assert_close(got, exact(sample), bound, str(sample))


@pytest.mark.parametrize(
    ("tile", "dtype", "tf32_allowed", "channels", "allowed"),
    [
        (2, torch.float32, False, 2048, 1e-6), (4, torch.float32, False, 2048, 3e-6),
        (6, torch.float32, False, 512, 1e-5), (2, torch.float32, True, 2048, 8e-4),
        (4, torch.float32, True, 512, 2.5e-3), (2, torch.float16, False, 512, 8e-4),
        (4, torch.float16, False, 512, 2.5e-3), (2, torch.bfloat16, False, 512, 6e-3),
    ],
)  # fmt: skip
def test_accuracy(tile: int, dtype: torch.dtype, tf32_allowed: bool, channels: int, allowed: float) -> None:
    x = maps(1, channels, 5, 4).relu().to(dtype)
    weight = (maps(17, channels, 3, 3, seed=1) / (9 * channels) ** 0.5).to(dtype)
    wanted = torch.conv2d(x.double(), weight.double(), padding=1)
    with use_backend("simt"), tf32(tf32_allowed):
        got = winograd_conv2d(x, weight, tile=tile)
    assert got.dtype == dtype
    assert relative(got, wanted) <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("tile", [2, 4, 5, 6])
def test_half_maps(tile: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x, residual = (maps(2, c, 9, 11, seed=c).to(dtype).contiguous(memory_format=memory_format) for c in (6, 10))
    weight, bias = maps(10, 3, 3, 3, seed=1).to(dtype), maps(10, seed=2).to(dtype)
    wanted = torch.conv2d(x.double(), weight.double(), bias.double(), padding=2, groups=2)[:, :, 1:-1, 1:-1]
    with use_backend("simt"):
        got = winograd_conv2d(x, weight, bias, groups=2, residual=residual, tile=tile)
    assert relative(got, wanted + residual.double()) <= (1e-2 if tile == 6 else 4e-3)


def test_chunks_that_end_within_an_image() -> None:
    """V and M of 180 tiles are more than a chunk, which holds 128: 3 images of 36 and a part of the next.

    The bits depend neither on the chunk an image is in nor on the memory format.
    """
    x, weight = maps(5, 384, 31, 32).float(), maps(3, 384, 3, 3, seed=1).float()
    wanted = torch.conv2d(x.double(), weight.double(), padding=1)
    with use_backend("simt"):
        together = winograd_conv2d(x.contiguous(memory_format=torch.channels_last), weight, tile=6)
        alone = winograd_conv2d(x[3:4], weight, tile=6)
    assert relative(together, wanted) <= 1e-5
    assert torch.equal(together[3:4], alone)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tile", [2, 4])
def test_pointers_that_are_not_16_byte_aligned(tile: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPKERN_WINOGRAD_CUDA", path)

    def shifted(tensor: Tensor) -> Tensor:
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return buffer[1:].view(tensor.shape).copy_(tensor)

    x, weight = maps(1, 9, 6, 7).float(), maps(20, 9, 3, 3, seed=1).float()
    packed = reference.winograd_transform_weight(weight, tile, 1)
    with use_backend("simt"):
        wanted = OP(x, packed, None, None, 20, tile, 1, 1, 0)
        got = OP(shifted(x), shifted(packed), None, None, 20, tile, 1, 1, 0)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("tile", [2, 4, 5, 6])
def test_packed_kernels_give_the_bits_of_transformed_ones(tile: int) -> None:
    x, weight = maps(1, 8, 6, 7).float(), maps(36, 4, 3, 3, seed=1).float()
    with use_backend("simt"):
        wanted = winograd_conv2d(x, weight, groups=2, tile=tile)
        packed = winograd_pack_weight(weight, groups=2)
        got = winograd_conv2d_packed(x, packed, out_channels=36, tile=tile, groups=2)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nan_stays_within_its_tile(
    memory_format: torch.memory_format, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPKERN_WINOGRAD_CUDA", path)
    x, weight = torch.ones(1, 10, 8, 8), torch.ones(3, 10, 3, 3)
    x[0, 3, 4, 5] = torch.nan
    with use_backend("simt"):
        broken = winograd_conv2d(x.contiguous(memory_format=memory_format), weight, activation="relu", tile=2).isnan()
    assert broken[:, :, 3:6, 4:7].all()
    broken[:, :, 2:6, 4:8] = False
    assert not broken.any()
