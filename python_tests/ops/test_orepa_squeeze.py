"""The public function: what users rely on beyond the op-level checks of test_all_ops.py."""

import pytest
import torch

from repkern import testing
from repkern.ops import SqueezeBranches, orepa_squeeze, orepa_squeeze_many
from repkern.ops.orepa_squeeze.prior import dct_filter
from repkern.ops.orepa_squeeze.reference import squeeze
from repkern.ops.orepa_squeeze.samples import random_layer


def leaves(layer):
    fields = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in layer[:9]]
    return layer._replace(**dict(zip(SqueezeBranches._fields, fields, strict=False)))


def parameters(layer):
    return [t for t in layer[:9] if t is not None]


@pytest.mark.parametrize("identity", [False, True])
def test_gradients_equal_autograd_through_the_reference(identity):
    layer = leaves(random_layer(6, 10, 3, groups=2, cm=12, expansion=3, identity_reduce=identity))
    outer = torch.randn(10, 3, 3, 3, dtype=torch.float64)
    ours = torch.autograd.grad(orepa_squeeze_many([layer])[0], parameters(layer), outer)
    theirs = torch.autograd.grad(squeeze(layer), parameters(layer), outer)
    for got, wanted in zip(ours, theirs, strict=True):
        testing.assert_close(got, wanted, 1e-13 * float(wanted.abs().max()))


def test_gradcheck_of_the_reference():
    layer = leaves(random_layer(2, 3, 3, expansion=2, cm=3))

    def kernel(*tensors):
        return squeeze(SqueezeBranches(*tensors, layer.prior_filter, 1, True))

    assert torch.autograd.gradcheck(kernel, parameters(layer))


def test_second_derivatives():
    layer = leaves(random_layer(2, 2, 3, expansion=1))

    def kernel(*tensors):
        return orepa_squeeze(*tensors, prior_filter=layer.prior_filter, identity_reduce=True)

    assert torch.autograd.gradgradcheck(kernel, parameters(layer))


def test_many_is_the_same_as_one_by_one():
    layers = [
        random_layer(5, 7, 3, expansion=2),
        random_layer(4, 4, 1, without=("avg", "prior", "pointwise", "project")),
    ]
    together = orepa_squeeze_many(layers)
    alone = [orepa_squeeze_many([layer])[0] for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert orepa_squeeze_many([]) == []


def test_unused_outputs_get_zero_gradients():
    layers = [leaves(random_layer(3, 3, 3, expansion=1)), leaves(random_layer(2, 2, 3, expansion=1))]
    used, _unused = orepa_squeeze_many(layers)
    used.sum().backward()
    assert all(bool((p.grad == 0).all()) for p in parameters(layers[1]))
    assert any(bool((p.grad != 0).any()) for p in parameters(layers[0]))


def test_the_default_prior_is_the_papers():
    layer = random_layer(3, 5, 5, expansion=1)
    explicit = orepa_squeeze(*layer[:9], prior_filter=dct_filter(5, 5, dtype=torch.float64))
    assert torch.equal(orepa_squeeze(*layer[:9]), explicit)


def test_dct_filter_follows_the_supplement_for_any_kernel_size():
    for channels, k in ((5, 3), (8, 5), (1, 7)):
        filters = dct_filter(channels, k, dtype=torch.float64)
        for c in range(channels):
            for h in range(k):
                for w in range(k):
                    at, frequency = (h, c + 1) if c < channels // 2 else (w, c - channels // 2 + 1)
                    wanted = torch.tensor(frequency * (at + 0.5) * torch.pi / k, dtype=torch.float64).cos()
                    assert abs(filters[c, h, w] - wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_computed_in_float32(dtype):
    layer = SqueezeBranches(*[t.to(dtype) if isinstance(t, torch.Tensor) else t for t in random_layer(6, 4, 3)])
    kernel = orepa_squeeze_many([leaves(layer)])[0]
    exact = squeeze(SqueezeBranches(*[t.double() if isinstance(t, torch.Tensor) else t for t in layer]))
    assert kernel.dtype == dtype
    testing.assert_close(kernel, exact, exact.abs() * torch.finfo(dtype).eps + 1e-3)
    kernel.sum().backward()


def test_out_dtype_and_memory_format():
    layer = leaves(random_layer(6, 4, 3, dtype=torch.float32))
    kernel = orepa_squeeze(*layer[:9], out_dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert kernel.dtype == torch.bfloat16
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    kernel.float().sum().backward()
    assert layer.origin.grad.dtype == torch.float32


def test_absent_branches_and_scale_forms_agree():
    full = random_layer(4, 6, 3, without=("avg", "project"))
    rows = [i for i, here in enumerate(full.present) if here]
    compact = full._replace(scale=full.scale[rows])
    assert torch.equal(orepa_squeeze_many([full])[0], orepa_squeeze_many([compact])[0])
    ones = full._replace(scale=torch.ones_like(full.scale))
    testing.assert_close(orepa_squeeze_many([full._replace(scale=None)])[0], orepa_squeeze_many([ones])[0], 1e-14)


def test_scale_rows_of_absent_branches_get_zero():
    layer = leaves(random_layer(4, 6, 3, without=("avg", "project")))
    orepa_squeeze_many([layer])[0].sum().backward()
    absent = [not here for here in layer.present]
    assert bool((layer.scale.grad[absent] == 0).all())
    assert bool((layer.scale.grad[[not a for a in absent]] != 0).any())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fullgraph_compile_and_export():
    layer = leaves(random_layer(5, 6, 3, dtype=torch.float32))

    def loss(*tensors):
        return orepa_squeeze(*tensors).square().sum()

    eager = torch.autograd.grad(loss(*layer[:9]), parameters(layer))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*layer[:9]), parameters(layer))
    for got, wanted in zip(compiled, eager, strict=True):
        testing.assert_close(got, wanted, 1e-5 * float(wanted.abs().max()))

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return orepa_squeeze(*tensors)

    inputs = tuple(t.detach() for t in layer[:9])
    exported = torch.export.export(Module(), inputs)
    assert torch.equal(exported.module()(*inputs), orepa_squeeze(*inputs))


def test_modes_and_profilers_see_both_passes():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer = leaves(random_layer(3, 3, 3, expansion=1))
    with Watch():
        orepa_squeeze_many([layer])[0].sum().backward()
    assert {"repkern.orepa_squeeze_many.default", "repkern.orepa_squeeze_many_backward.default"} <= set(seen)


class TestBadInput:
    def refuse(self, match, error=ValueError, groups=1, **changes):
        layer = random_layer(4, 6, 3, expansion=2, dtype=torch.float32)._replace(**changes)
        with pytest.raises(error, match=match):
            orepa_squeeze(*layer[:9], groups=groups, prior_filter=layer.prior_filter)

    def test_even_kernel(self):
        with pytest.raises(ValueError, match="must be odd, got 4"):
            orepa_squeeze(torch.zeros(2, 2, 4, 4))

    def test_no_branch_at_all(self):
        with pytest.raises(ValueError, match="every branch is None"):
            orepa_squeeze(None)

    def test_branches_that_do_not_determine_the_kernel(self):
        with pytest.raises(ValueError, match="do not determine"):
            orepa_squeeze(None, torch.zeros(2, 2))

    def test_zero_channels(self):
        with pytest.raises(ValueError, match="Co=0"):
            orepa_squeeze(torch.zeros(0, 2, 3, 3))

    def test_groups(self):
        self.refuse(r"Co \(=6\) must be divisible by `groups` \(=4\)", groups=4)
        self.refuse("`groups` must be at least 1, got 0", groups=0)

    def test_internal_channels(self):
        self.refuse(r"`expand` must have shape \(6, 4, 3, 3\), got \(6, 5, 3, 3\)", expand=torch.zeros(6, 5, 3, 3))

    def test_half_a_branch(self):
        self.refuse("`depthwise` and `project` belong to one branch", project=None)
        self.refuse("`reduce` and `expand` belong to one branch", reduce=None)

    def test_scale(self):
        self.refuse("`scale` must have 6 rows", scale=torch.zeros(5, 6))
        self.refuse(r"`scale` must have shape \(6, 6\)", scale=torch.zeros(6, 7))

    def test_dtypes(self):
        self.refuse("one dtype", error=TypeError, avg=torch.zeros(6, 4, dtype=torch.float64))
        self.refuse("got int64", error=TypeError, avg=torch.zeros(6, 4, dtype=torch.int64))
        with pytest.raises(TypeError, match="out_dtype must be one of"):
            orepa_squeeze(torch.zeros(2, 2, 3, 3), out_dtype=torch.int32)
        with pytest.raises(ValueError, match="memory_format"):
            orepa_squeeze(torch.zeros(2, 2, 3, 3), memory_format=torch.preserve_format)

    def test_sparse(self):
        self.refuse("dense", error=TypeError, avg=torch.zeros(6, 4).to_sparse())
