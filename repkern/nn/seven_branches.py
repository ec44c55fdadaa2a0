"""The seven branches that RepNAS and DyRep choose from, as one block with any subset of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._pointwise import pointwise_map
from repkern.nn._weight_hooks import current_bias, current_weight, weight_in_forward
from repkern.nn.block import RepBlock
from repkern.nn.branch_sum import Branch
from repkern.nn.fold import KernelBias, add_branches, compose_sequential, fuse_bn, pad_to
from repkern.nn.geometry import Geometry
from repkern.nn.identity_pointwise import IdentityPointwise
from repkern.nn.inner_norm import BORDERS, InnerNorm, averaged, averaging_kernel, bordered, convolve
from repkern.nn.line import line_conv, pad_line, stripped
from repkern.nn.normed_sum import NormedSumBlock, plain_conv, set_kernel, solve_before_norm

__all__ = ["SEVEN_BRANCHES", "SevenBranchBlock"]

# The submodules of each branch, its last norm last.
_PARTS = {
    "1x1": ("pointwise", "pointwise_bn"),
    "1x1_kxk": ("reduce", "reduce_bn", "expand", "expand_bn"),
    "1x1_avg": ("avg", "avg_inner_bn", "avg_bn"),
    "kxk": ("dense", "dense_bn"),
    "1xk": ("horizontal", "horizontal_bn"),
    "kx1": ("vertical", "vertical_bn"),
    "id": ("identity_bn",),
}

#: The names of the branches, in the released order.
SEVEN_BRANCHES = tuple(_PARTS)

# With K = 1 the others would be the KxK branch once more.
_OF_1X1 = ("1x1_kxk", "kxk", "id")


class SevenBranchBlock(NormedSumBlock):
    """activation(sum of any of BN(1x1), BN(KxK(BN(1x1))), BN(average(BN(1x1))), BN(KxK), BN(1xK), BN(Kx1), BN(x)).

    What DyRepBlock and ODBBlock share; they say which branches must exist. `dense` and `expand` may themselves be
    blocks, whose kernels are folded recursively. Depthwise (groups = Ci = Co), the average is that of the input.
    """

    dense: nn.Module | None
    dense_bn: nn.Module | None
    pointwise: nn.Module | None
    pointwise_bn: nn.Module | None
    avg: Any
    avg_inner_bn: nn.Module | None
    avg_bn: nn.Module | None
    reduce: Any
    reduce_bn: nn.Module | None
    expand: nn.Module | None
    expand_bn: nn.Module | None
    horizontal: Any
    horizontal_bn: nn.Module | None
    vertical: Any
    vertical_bn: nn.Module | None

    _biased = frozenset(("dense", "pointwise"))
    #: Whether the KxK convolution has a bias.
    _dense_bias = False
    #: Whether `reduce` holds the deviation from an identity.
    _identity_reduce = False

    def __init__(
        self,
        geometry: Geometry,
        activation: nn.Module | None,
        recompute: str,
        branches: Sequence[str] | None,
        internal_channels: int | None,
        border: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(geometry, activation, None, None, recompute, device, dtype)
        if border not in BORDERS:
            raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
        internal = geometry.in_channels if internal_channels is None else internal_channels
        if internal < 1 or internal % geometry.groups:
            raise ValueError(
                f"internal_channels (={internal}) must be a positive multiple of groups (={geometry.groups})"
            )
        self.internal_channels = internal
        self.border = border
        for parts in _PARTS.values():
            for part in parts:
                self.register_module(part, None)  # so that branches added later keep their place
        self._add(self.possible_branches if branches is None else branches, {"device": device, "dtype": dtype})

    @property
    def possible_branches(self) -> tuple[str, ...]:
        """The branches that blocks of this geometry can have, in the order of `SEVEN_BRANCHES`."""
        names = SEVEN_BRANCHES if self.kernel_size[0] > 1 else _OF_1X1
        return tuple(name for name in names if name != "id" or self._keeps_positions)

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that are there, in the order of `SEVEN_BRANCHES`."""
        return tuple(name for name, parts in _PARTS.items() if getattr(self, parts[-1]) is not None)

    def last_norm(self, branch: str) -> nn.Module:
        """The norm that ends a branch. ValueError for one that is not there."""
        if branch not in self.branches:
            raise ValueError(f"there is no branch {branch!r}, only {', '.join(self.branches)}")
        norm = getattr(self, _PARTS[branch][-1])
        assert isinstance(norm, nn.Module)
        return norm

    def _modules_of(self, branch: str) -> list[nn.Module]:
        modules = (getattr(self, part) for part in _PARTS[branch])
        return [module for module in modules if module is not None]

    def _add(self, names: Sequence[str], factory: dict[str, Any]) -> None:
        impossible = [name for name in names if name not in self.possible_branches]
        if impossible or len(set(names)) != len(names):
            raise ValueError(
                f"branches must be any of {', '.join(self.possible_branches)} once each for this geometry, "
                f"got {tuple(names)}"
            )
        for name in names:
            for part, module in zip(_PARTS[name], self._make(name, factory), strict=True):
                setattr(self, part, None if module is None else module.train(self.training))

    def _remove(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.branches]
        if missing:
            raise ValueError(f"there is no branch {', '.join(missing)}, only {', '.join(self.branches)}")
        for name in names:
            for part in _PARTS[name]:
                setattr(self, part, None)

    def _make(self, name: str, factory: dict[str, Any]) -> Sequence[nn.Module | None]:
        """Fresh modules of a branch, in the order of its parts."""
        ci, co, cm, groups = self.in_channels, self.out_channels, self.internal_channels, self.groups
        norm = nn.BatchNorm2d(co, **factory)
        if name == "kxk":
            dense = plain_conv(self._geometry, **factory)
            if self._dense_bias:
                dense.bias = nn.Parameter(torch.zeros(co, **factory))
            return dense, norm
        if name == "1x1":
            return nn.Conv2d(ci, co, 1, self.stride, groups=groups, bias=False, **factory), norm
        if name == "1x1_avg":
            if groups == ci == co:  # one more scale per channel would add nothing
                return None, None, norm
            return nn.Conv2d(ci, co, 1, groups=groups, bias=False, **factory), nn.BatchNorm2d(co, **factory), norm
        if name == "1x1_kxk":
            reduce = (
                IdentityPointwise(ci, cm, groups, factory)
                if self._identity_reduce
                else nn.Conv2d(ci, cm, 1, groups=groups, bias=False, **factory)
            )
            # It reads a map that is padded already.
            inner = self._geometry._replace(in_channels=cm, padding=(0, 0), padding_mode="zeros")
            expand = plain_conv(inner, **factory)
            return reduce, nn.BatchNorm2d(cm, **factory), expand, norm
        if name == "id":
            return (norm,)
        return line_conv(self, 0 if name == "1xk" else 1, factory), norm

    # --- the training form

    def _branches(self) -> list[Branch]:
        return [self._branch(name) for name in self.branches]

    def _branch(self, name: str) -> Branch:
        norm = self.last_norm(name)
        if name == "kxk":
            return Branch(norm, self.dense)
        if name == "1x1":
            return Branch(norm, self._pointwise_map, cheap=True)
        if name == "1x1_avg":
            return Branch(norm, self._average_map, cheap=True)
        if name == "1x1_kxk":
            return Branch(norm, self._expand_map)
        if name == "id":
            return Branch(norm)
        return Branch(norm, functools.partial(self._line_map, across=0 if name == "1xk" else 1))

    def _pointwise_map(self, x: Tensor) -> Tensor:
        assert self.pointwise is not None
        return pointwise_map(self.pointwise, self._centre(x))

    def _average_map(self, x: Tensor) -> Tensor:
        kernel = averaging_kernel(self.out_channels, self.kernel_size[0], x)
        if self.avg is None or self.avg_inner_bn is None:
            return convolve(self, x, kernel, None, self.out_channels)
        inner = InnerNorm(self, self.avg, self.avg_inner_bn, self.last_norm("1x1_avg"), self.border)
        return inner.convolve(x, kernel, self.out_channels)

    def _expand_map(self, x: Tensor) -> Tensor:
        assert self.expand is not None
        if self.reduce is None or self.reduce_bn is None:
            if not isinstance(self.expand, RepBlock):
                return convolve(self, x, weight_in_forward(self.expand), None, self.groups)
            return self.expand(bordered(self, x))
        remake = self.recompute == "cheap"
        inner = InnerNorm(self, self.reduce, self.reduce_bn, self.last_norm("1x1_kxk"), self.border, remake)
        if not isinstance(self.expand, RepBlock):
            return inner.convolve(x, weight_in_forward(self.expand), self.groups)
        return self.expand(inner.bordered(x))

    def _line_map(self, x: Tensor, across: int) -> Tensor:
        line = self.horizontal if across == 0 else self.vertical
        return line(stripped(self, x, across))

    # --- the deployed form

    def _fold(self) -> KernelBias:
        parameter = next(self.parameters())
        wide = torch.promote_types(parameter.dtype, torch.float32)
        weight, bias = self._fold_in(parameter.to(wide))
        assert bias is not None
        return weight.to(parameter.dtype), bias.to(parameter.dtype)

    def _fold_in(self, like: Tensor) -> KernelBias:
        """The equivalent convolution in `like`'s dtype and on its device."""
        return add_branches([self._folded(name, like) for name in self.branches])

    def _folded(self, name: str, like: Tensor) -> KernelBias:
        k = self.kernel_size[0]
        if name == "id":
            return self._folded_identity(like)[0]
        if name == "kxk":
            folded = _kernel_bias(self.dense, like)
        elif name == "1x1":
            weight, bias = _kernel_bias(self.pointwise, like)
            folded = pad_to(weight, k), bias
        elif name == "1x1_avg":
            if self.avg is None or self.avg_inner_bn is None:
                folded = averaging_kernel(self.out_channels, k, like), None
            else:
                folded = averaged(fuse_bn(*_kernel_bias(self.avg, like), self.avg_inner_bn), k)
        elif name == "1x1_kxk":
            folded = _kernel_bias(self.expand, like)
            if self.reduce is not None and self.reduce_bn is not None:
                first = fuse_bn(*_kernel_bias(self.reduce, like), self.reduce_bn)
                folded = compose_sequential(first, folded, groups=self.groups)
        else:
            across = 0 if name == "1xk" else 1
            line = current_weight(self.horizontal if across == 0 else self.vertical)
            folded = pad_line(line.to(like.dtype), across), None
        return fuse_bn(*folded, self.last_norm(name))

    def _folded_others(self, like: Tensor) -> list[KernelBias]:
        return [self._folded(name, like) for name in self.branches if name != "kxk"]

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for `dense` and its norm's shift; exact in eval mode.

        ValueError where that norm scales a channel by 0, or there is no KxK branch.
        """
        if self.dense is None or self.dense_bn is None:
            raise ValueError("a block without the branch 'kxk' cannot start as a given convolution (preserve=True)")
        others = self._folded_others(weight.double())
        if not isinstance(self.dense, RepBlock) and isinstance(self.dense.bias, Tensor):
            factor, _ = fuse_bn(torch.ones_like(self.dense.bias, dtype=torch.float64), None, self.dense_bn)
            others.append((torch.zeros_like(weight, dtype=torch.float64), factor * self.dense.bias))
        kernel = solve_before_norm(weight, bias, self.dense_bn, others, "dense_bn")
        set_kernel(self.dense, kernel)


def _kernel_bias(module: Any, like: Tensor) -> KernelBias:
    """The convolution that a branch's module computes, in `like`'s dtype."""
    if isinstance(module, SevenBranchBlock):
        return module._fold_in(like)
    if isinstance(module, IdentityPointwise):
        return module.kernel().to(like.dtype), None
    weight, bias = module._fold() if isinstance(module, RepBlock) else (current_weight(module), current_bias(module))
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
