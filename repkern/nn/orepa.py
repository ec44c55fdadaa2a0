"""OREPAConv2d: the drop-in for nn.Conv2d whose kernel is squeezed from up to six branches every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repkern.nn.branch_weight import BranchWeight, tensor_of, write_weight
from repkern.nn.fold import KernelBias, dct_kernel, identity_kernel
from repkern.nn.geometry import Pair, check_count, check_dtype, check_geometry
from repkern.nn.kernel_conv import KernelConv2d
from repkern.ops import SqueezeBranches, orepa_squeeze_many
from repkern.ops.orepa_squeeze.layers import BRANCH_NAMES

__all__ = ["INITIAL", "SCALINGS", "GroupedKernel", "OREPAConv2d"]

SCALINGS = ("vector", "scalar", "none")
INITIAL = ("paper", "plain")
# Paper, supplement 2.1; for K = 1 (Rep-1x1) the released code, since the paper gives no values.
INITIAL_SCALE = {"origin": 0.25, "avg": 0.5, "prior": 0.0, "1x1-KxK": 0.5, "1x1": 1.0, "dw-pw": 0.5}
INITIAL_SCALE_1X1 = {"origin": 1.0, "1x1-KxK": 0.5}
# The parameter that is linear in the branch's output and so can take over its scale.
_LAST_PARAMETER = {
    "origin": "origin", "avg": "avg", "prior": "prior", "1x1-KxK": "expand", "1x1": "pointwise", "dw-pw": "project",
}  # fmt: skip


_BRANCH_WEIGHTS = ("origin", "avg", "prior", "pointwise", "reduce", "expand", "depthwise", "project")


class GroupedKernel(NamedTuple):
    """A kernel that `group_squeeze` made for the forward in progress, and whether it carries gradients."""

    kernel: Tensor
    with_grad: bool


def _is_channels_last(x: Tensor) -> bool:
    if torch._C._are_functorch_transforms_active():  # where formats cannot be asked for
        return False
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _check_branches(branches: Sequence[str] | None, kernel_size: int) -> tuple[str, ...]:
    possible = tuple(INITIAL_SCALE_1X1) if kernel_size == 1 else BRANCH_NAMES
    if branches is None:
        return possible
    unknown = [name for name in branches if name not in possible]
    if unknown or "origin" not in branches or len(set(branches)) != len(branches):
        raise ValueError(
            f"branches must name 'origin' and any of {', '.join(possible)} once each for kernel size {kernel_size}, "
            f"got {tuple(branches)}"
        )
    return tuple(name for name in possible if name in branches)


class OREPAConv2d(KernelConv2d):
    """nn.Conv2d, trained as the six linear branches of OREPA (paper 2204.00826, Fig. 6), computed as one convolution.

    Arguments and attributes as nn.Conv2d, with `padding` an integer, a pair, "same" or "valid". kernel_size: any odd K,
    an integer or a square pair; K = 1 is the paper's Rep-1x1 (origin + 1x1-1x1). There is no norm inside; the norm that
    follows it in the network is the post-addition norm the paper needs.

    scaling: "vector" (per branch and output channel, the default), "scalar" (per branch) or "none" (paper, Table 3).
    internal_channels: Cm of the 1x1-KxK branch; default Ci, or 2 Ci from more than 4 groups on (as released); for K = 1
    min(Ci, Co). expansion: filters per input channel of the dw-pw branch. branches: which of
    ("origin", "avg", "prior", "1x1-KxK", "1x1", "dw-pw") exist; default all. initial: "paper", the default, or "plain":
    the same values with the last weight of each branch made smaller, so that the kernel is as large as a fresh
    nn.Conv2d's and, with a norm behind it, learns as fast (docs/evidence.md).

    Submodules (absent ones are None), each of which holds one parameter, `weight`, B branches: origin [Co, Ci/g, K, K],
    avg, prior, pointwise [Co, Ci/g], reduce [Cm, Ci/g] (for K > 1 the deviation from an identity), expand
    [Co, Cm/g, K, K], depthwise [Ci*e, K, K], project [Co, Ci/g*e], scale [B*Co] or [B] (row by row). Parameter: bias
    [Co] or None. Buffer: prior_filter [Co, K, K], at least float32, saved only when it is not the paper's. `weight` is
    the squeezed kernel, and may be written: see `KernelConv2d`. With dtype float32 and autocast the kernel comes out in
    autocast's dtype.

    Input [N, Ci, H, W] or [Ci, H, W]; ValueError for another, and for arguments that cannot be a block.
    """

    origin: BranchWeight
    avg: BranchWeight | None
    prior: BranchWeight | None
    pointwise: BranchWeight | None
    reduce: BranchWeight | None
    expand: BranchWeight | None
    depthwise: BranchWeight | None
    project: BranchWeight | None
    scale: BranchWeight | None
    prior_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scaling: str = "vector",
        internal_channels: int | None = None,
        expansion: int = 8,
        branches: Sequence[str] | None = None,
        initial: str = "paper",
    ) -> None:
        check_dtype(dtype)
        super().__init__(
            check_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        )
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
        if initial not in INITIAL:
            raise ValueError(f"initial must be one of {', '.join(INITIAL)}, got {initial!r}")
        expansion = check_count("expansion", expansion)
        self.scaling = scaling
        self.initial = initial
        self.expansion = expansion
        self.branches = _check_branches(branches, self.kernel_size[0])
        self.internal_channels = self._check_internal(internal_channels)
        self._register_parameters(bias, {"device": device, "dtype": dtype})
        # Parameters stay contiguous, which is what the kernels read; channels_last is only remembered.
        self._channels_last = False
        self.grouped: GroupedKernel | None = None
        # False in a factor of a larger kernel: what it is composed into keeps the parameters' precision.
        self.follows_autocast = True
        self._saw_channels_last = False
        self._grouped_with_grad = False
        self.reset_parameters()

    def _check_internal(self, internal_channels: int | None) -> int:
        if internal_channels is None:
            if self.kernel_size[0] == 1:
                return min(self.in_channels, self.out_channels)
            return self.in_channels if self.groups <= 4 else 2 * self.in_channels
        internal_channels = check_count("internal_channels", internal_channels)
        if internal_channels % self.groups:
            raise ValueError(
                f"internal_channels (={internal_channels}) must be a positive multiple of groups (={self.groups})"
            )
        return internal_channels

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        co, cig, k, cm = self.out_channels, self.in_channels // self.groups, self.kernel_size[0], self.internal_channels
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "origin": ("origin", (co, cig, k, k)),
            "avg": ("avg", (co, cig)),
            "prior": ("prior", (co, cig)),
            "pointwise": ("1x1", (co, cig)),
            "reduce": ("1x1-KxK", (cm, cig)),
            "expand": ("1x1-KxK", (co, cm // self.groups, k, k)),
            "depthwise": ("dw-pw", (self.in_channels * self.expansion, k, k)),
            "project": ("dw-pw", (co, cig * self.expansion)),
        }
        return {name: shape for name, (branch, shape) in shapes.items() if branch in self.branches}

    def _register_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        shapes = self._shapes()
        if self.scaling != "none":
            shapes["scale"] = (len(self.branches) * (self.out_channels if self.scaling == "vector" else 1),)
        for name in (*_BRANCH_WEIGHTS, "scale"):
            shape = shapes.get(name)
            self.register_module(name, None if shape is None else BranchWeight(torch.empty(shape, **factory)))
        self._register_bias(nn.Parameter(torch.empty(self.out_channels, **factory)) if bias else None)
        k = self.kernel_size[0]
        filters = torch.empty(self.out_channels, k, k, **factory) if "prior" in self.branches else None
        self.register_buffer("prior_filter", filters, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        own: torch.dtype = tensor_of(self._modules["origin"]).dtype
        return own

    @property
    def identity_reduce(self) -> bool:
        """Whether `reduce` is the deviation from an identity 1x1: for K > 1, and for Rep-1x1 when Co > Ci."""
        return self.kernel_size[0] > 1 or self.out_channels > self.in_channels

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values: scales of the paper's supplement (2.1), kaiming-uniform weights, identity 1x1, default prior.

        With scaling="none" each branch's initial scale is multiplied into its last weight instead.
        """
        one_by_one = self.kernel_size[0] == 1
        self._reset_weights(math.sqrt(2.0) if not one_by_one else 1.0)
        initial = INITIAL_SCALE_1X1 if one_by_one else INITIAL_SCALE
        for row, branch in enumerate(self.branches):
            if self.scale is not None:
                self._scale_rows()[row].fill_(initial[branch])
            else:
                getattr(self, _LAST_PARAMETER[branch]).weight.mul_(initial[branch])
        self._reset_prior_filter()
        if self.initial == "plain":
            # nn.Conv2d starts with the variance 1 / (3 fan_in).
            factor = math.sqrt(self.out_channels / 3) / self.wide_kernel().norm()
            for branch in self.branches:
                getattr(self, _LAST_PARAMETER[branch]).weight.mul_(factor)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels // self.groups * self.kernel_size[0] ** 2)
            self.bias.uniform_(-bound, bound)

    def _reset_weights(self, gain: float) -> None:
        k, per_group = self.kernel_size[0], self.in_channels // self.groups
        fan_in = {"origin": per_group * k * k, "depthwise": k * k, "project": per_group * self.expansion}
        fan_in["expand"] = self.internal_channels // self.groups * k * k
        for name in self._shapes():
            bound = gain * math.sqrt(3 / fan_in.get(name, per_group))
            getattr(self, name).weight.uniform_(-bound, bound)
        if self.reduce is not None and self.identity_reduce:
            self.reduce.weight.zero_()
        elif self.expand is not None and self.internal_channels == self.out_channels:
            self.expand.weight.copy_(identity_kernel(self.out_channels, k, self.groups, dtype=self.dtype))

    def _scale_rows(self) -> Tensor:
        """[B, Co] or [B, 1]."""
        rows: Tensor = tensor_of(self._modules["scale"]).view(len(self.branches), -1)
        return rows

    def _reset_prior_filter(self) -> None:
        if self.prior_filter is None:
            return
        wide = torch.promote_types(self.dtype, torch.float32)
        device = self.origin.weight.device
        if device.type == "meta":  # nothing to compute, and nothing to fill the memory with
            filters = torch.empty_like(self.prior_filter, dtype=wide)
        else:
            filters = dct_kernel(self.out_channels, self.kernel_size[0], dtype=wide).to(device)
        self.register_buffer("prior_filter", filters, persistent=False)

    def set_prior_filter(self, filters: Tensor) -> None:
        """Use other fixed filters [Co, K, K] in the prior branch; from now on they are part of the state_dict."""
        if self.prior_filter is None or filters.shape != self.prior_filter.shape:
            wanted = None if self.prior_filter is None else tuple(self.prior_filter.shape)
            raise ValueError(f"prior_filter must have shape {wanted}, got {tuple(filters.shape)}")
        wide = torch.promote_types(self.dtype, torch.float32)
        own = filters.detach().to(device=self.prior_filter.device, dtype=wide, copy=True)
        self.register_buffer("prior_filter", own.contiguous(), persistent=True)

    def squeeze_branches(self) -> SqueezeBranches:
        """This block's tensors as `repkern.ops.orepa_squeeze_many` takes them."""
        scale: Tensor | None = None
        if self._modules["scale"] is not None:
            scale = self._scale_rows()
            if self.scaling == "scalar":
                scale = scale.expand(-1, self.out_channels)
        modules = self._modules
        own: Any = [tensor_of(modules[name]) for name in _BRANCH_WEIGHTS]
        identity_reduce = modules["reduce"] is not None and self.identity_reduce
        own += [scale, self._buffers["prior_filter"], self.groups, identity_reduce]
        return SqueezeBranches._make(own)

    def squeezed_kernel(
        self,
        *,
        out_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """The kernel [Co, Ci/g, K, K] of this step, with a gradient to every branch."""
        return orepa_squeeze_many([self.squeeze_branches()], out_dtype=out_dtype, memory_format=memory_format)[0]

    def parameter_kernel(self) -> Tensor:
        """The kernel in the parameters' dtype: what a larger kernel is composed from."""
        return self._kernel(self.dtype, torch.contiguous_format)

    def wide_kernel(self) -> Tensor:
        """The kernel in at least float32: what is folded further before it is rounded."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return self.squeezed_kernel(out_dtype=wide, memory_format=self.kernel_format())

    def kernel_dtype(self, device_type: str) -> torch.dtype:
        """The dtype conv2d computes in: autocast's for parameters it casts, else the parameters'."""
        # Asked about "meta", torch raises instead of saying no.
        casts = self.follows_autocast and self.dtype is not torch.float64 and device_type != "meta"
        if casts and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.dtype

    def kernel_format(self, x: Tensor | None = None) -> torch.memory_format:
        """channels_last when the input is, or when this module was converted to it: where nn.Conv2d would use it."""
        if self._channels_last or (x is not None and _is_channels_last(x)):
            return torch.channels_last
        return torch.contiguous_format

    @property
    def last_format(self) -> torch.memory_format:
        """The memory format that suited the last input, for those who make the kernel before they see the next."""
        return torch.channels_last if self._channels_last or self._saw_channels_last else torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        """One squeeze, one conv2d: [N, Ci, H, W] -> [N, Co, H', W']."""
        memory_format = self.kernel_format(x)
        if self.grouped is not None:
            self._saw_channels_last = memory_format is torch.channels_last
        return self._conv(x, self._kernel(self.kernel_dtype(x.device.type), memory_format), self.bias)

    def _kernel(self, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """The kernel made by `group_squeeze` where it fits this call, else a fresh one."""
        if self.grouped is not None:
            kernel, with_grad = self.grouped
            if kernel.dtype == dtype and (with_grad or not torch.is_grad_enabled()):
                self._grouped_with_grad = torch.is_grad_enabled() and kernel.requires_grad
                return kernel
            self._grouped_with_grad = False
        if not (self._grouped_with_grad and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1):
            return self.squeezed_kernel(out_dtype=dtype, memory_format=memory_format)
        # Non-reentrant checkpointing recomputes this call inside the backward only to learn what it saved, and the
        # first time the kernel came ready-made: it must again be a leaf, or more is saved than was.
        with torch.no_grad():
            kernel = self.squeezed_kernel(out_dtype=dtype, memory_format=memory_format)
        return kernel.requires_grad_()

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K] in the parameters' dtype, with a gradient to every branch."""
        return self.squeezed_kernel(memory_format=self.kernel_format())

    def _fold(self) -> KernelBias:
        return self.kernel(), self.bias

    def _solve(self, weight: Tensor) -> None:
        """Solve for `origin`; the rest stays. ValueError where origin's scale is 0."""
        fields = [t.double() if isinstance(t, Tensor) else t for t in self.squeeze_branches()]
        layer = SqueezeBranches(*fields)  # type: ignore[arg-type]
        assert layer.origin is not None
        origin = weight - orepa_squeeze_many([layer._replace(origin=torch.zeros_like(layer.origin))])[0]
        if layer.scale is not None:
            if layer.scale.device.type != "meta" and not layer.scale[0].all():
                raise ValueError("the scale of `origin` is 0, so no origin gives the wanted kernel")
            origin = origin / layer.scale[0][:, None, None, None]
        write_weight(self.origin, origin)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OREPAConv2d:
        probe = torch.empty(1, 2, 2, 2, dtype=self.dtype, device=self.origin.weight.device)
        moved = fn(probe.to(memory_format=self.kernel_format()))
        filters = self.prior_filter
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        if filters is not None and self.prior_filter is not None:
            self._keep_filters_wide(filters)
        self._channels_last = _is_channels_last(moved)
        return self

    def _keep_filters_wide(self, before: Tensor) -> None:
        """Constants, which half precision would only round: they stay in at least float32."""
        moved = self.prior_filter
        assert moved is not None
        wide = torch.promote_types(self.dtype, torch.float32)
        if before.device.type == "meta" != moved.device.type:  # to_empty: constants that no state_dict brings back
            self._reset_prior_filter()
            return
        if "prior_filter" in self._non_persistent_buffers_set:
            if moved.dtype != before.dtype or moved.dtype != wide:
                self._reset_prior_filter()
        elif moved.dtype != wide:
            self.prior_filter = before.to(device=moved.device, dtype=wide).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        # A kernel of the forward in progress belongs to that forward: copies squeeze their own.
        return {**self.__dict__, "grouped": None, "_grouped_with_grad": False}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Filters other than the paper's are in the state_dict; without them the module returns to the paper's.
        if self.prior_filter is not None:
            given = state_dict.get(f"{prefix}prior_filter")
            if given is not None:
                self.register_buffer("prior_filter", self.prior_filter.clone(), persistent=True)
            elif "prior_filter" not in self._non_persistent_buffers_set:
                self._reset_prior_filter()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """As nn.Conv2d prints itself, and what differs from the default block."""
        text = super().extra_repr()
        if self.bias is None:
            text += ", bias=False"
        if self.scaling != "vector":
            text += f", scaling={self.scaling}"
        if self.branches != _check_branches(None, self.kernel_size[0]):
            text += f", branches={self.branches}"
        if self.initial != "paper":
            text += f", initial={self.initial}"
        return text
