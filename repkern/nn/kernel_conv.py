"""KernelConv2d: an nn.Conv2d whose weight is computed from other parameters, every step anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from repkern.nn.block import RepBlock
from repkern.nn.computed_weight import readable_weight
from repkern.nn.fold import KernelBias, wide

__all__ = ["KernelConv2d"]


class KernelConv2d(RepBlock, nn.Conv2d):  # type: ignore[misc]
    """A drop-in for nn.Conv2d, also for code that asks whether it is one and touches its `weight`.

    Reading `weight` [Co, Ci/g, K, K] gives the kernel that the next forward uses, with a gradient to the parameters
    behind it. Writing, be it an assignment, in place, to `.data` or by an initializer, solves for the parameters so
    that the kernel is what was written (see `set_equivalent_kernel_bias`), or raises. `weight.requires_grad_()` sets
    that of all parameters behind it. It is no parameter: optimizers get those of the submodules. `bias` is one, or
    None.

    Subclasses implement `kernel` and `_solve`, and call `_register_bias` in __init__.
    """

    has_norm = False
    _has_parts = False

    bias: nn.Parameter | None  # type: ignore[assignment]

    def _register_bias(self, bias: nn.Parameter | None) -> None:
        self.transposed = False
        self.output_padding = (0, 0)
        self.register_parameter("bias", bias)

    def kernel(self) -> Tensor:
        """[Co, Ci/g, K, K] of the next forward outside autocast, with a gradient to every parameter behind it."""
        raise NotImplementedError

    def _solve(self, weight: Tensor) -> None:
        """Change the parameters so that `kernel()` gives `weight`, which is in float64. ValueError if none do."""
        raise NotImplementedError

    def wide_kernel(self) -> Tensor:
        """The kernel in at least float32: what is folded further before it is rounded."""
        return wide(self.kernel())

    @property
    def _reversed_padding_repeated_twice(self) -> list[int]:  # type: ignore[override]
        height, width = self._pad
        return [width, width, height, height]

    def kernel_parameters(self) -> list[nn.Parameter]:
        """The parameters behind the kernel: all but the bias."""
        return [parameter for parameter in self.parameters() if parameter is not self.bias]

    def train_kernel(self, wanted: bool = True) -> None:
        """Whether the parameters behind the kernel require gradients: what `weight.requires_grad_()` does."""
        for parameter in self.kernel_parameters():
            parameter.requires_grad_(wanted)

    @property
    def trains_kernel(self) -> bool:
        """Whether any parameter behind the kernel requires a gradient."""
        return any(parameter.requires_grad for parameter in self.kernel_parameters())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[Co, Ci/g, K, K]: the kernel of the next forward; see the class."""
        try:
            if any(isinstance(getattr(holder, "weight", None), fx.Proxy) for holder in self.children()):
                raise RuntimeError(
                    f"torch.fx cannot trace code that reads the computed weight of a {type(self).__name__}; call the "
                    "module instead, or use torch.compile or torch.export"
                )
            return readable_weight(self, self.kernel())
        except AttributeError as problem:  # which nn.Module would take for "no such attribute"
            raise RuntimeError(f"{type(self).__name__}.weight: {problem}") from problem

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"the weight of a {type(self).__name__} can be written, not removed or replaced by "
                    f"{type(value).__name__}: give a tensor [Co, Ci/g, K, K]"
                )
            self.write_kernel(value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's. ValueError for what torch's pruning makes of a `weight` that is no parameter."""
        if name.startswith("weight"):
            raise ValueError(
                f"the weight of a {type(self).__name__} is computed from its branches, so {name} cannot become a "
                "parameter: prune or normalize the branches (`origin`, ...), or the network that reparameterize gives"
            )
        super().register_parameter(name, param)

    @torch.no_grad()
    def write_kernel(self, weight: Tensor) -> None:
        """Solve for the parameters so that the kernel is `weight`. ValueError for another shape, or if none do."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"the weight of this {type(self).__name__} is {list(shape)}, got {list(weight.shape)}: its "
                    "parameters are made for that; make a new block for another"
                )
            self._solve(weight.detach().as_subclass(Tensor).double())

    def forward(self, x: Tensor) -> Tensor:
        """[(N,) Ci, H, W] -> [(N,) Co, H', W']."""
        return self._conv(x, self.kernel(), self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv(input, weight, bias)

    def _fold(self) -> KernelBias:
        return self.kernel(), self.bias

    @property
    def _deployed_bias(self) -> bool:
        return self.bias is not None

    def fuse(self) -> nn.Module:
        """nn.Conv2d with this block's kernel and bias; the bias keeps its own requires_grad."""
        conv = super().fuse()
        if self.bias is not None:
            conv.weight.requires_grad_(self.trains_kernel)
            conv.bias.requires_grad_(self.bias.requires_grad)
        return conv

    @torch.no_grad()
    def set_equivalent_kernel_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Solve for the parameters, in float64. ValueError if none do, and for a bias that has no place."""
        if self.bias is None and bias is not None and bias.any():
            raise ValueError(f"this {type(self).__name__} has no bias to take the wanted one; make it with bias=True")
        self.write_kernel(weight)
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)

    @torch.no_grad()
    def set_kernel_before_norm(self, weight: Tensor, bias: Tensor | None) -> None:
        """The same: there is no norm inside."""
        self.set_equivalent_kernel_bias(weight, bias)

    def adopt_norm(self, norm: nn.Module) -> bool:
        """False: there is no norm inside."""
        return False

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> Any:
        """A fresh block with the arguments, dtype and device of `conv`, its bias (or none), and other `options`."""
        return super().from_conv(conv, bias=conv.bias is not None, **options)
