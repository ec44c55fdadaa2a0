"""ComputedWeight: the `weight` of a convolution that computes it. Reading is differentiable, writing changes the block.

torch's parametrized modules are the precedent: `weight` is a tensor that is no parameter, and assigning to it goes
through an inverse. Initializers and surgery, however, write in place (`conv.weight.data.normal_()`); such a write must
not be lost either, so the tensor, its `.data`, its `.detach()` and its views remember whose kernel they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["ComputedWeight", "is_written_in_place", "readable_weight"]

_data: Any = Tensor.data
_requires_grad: Any = Tensor.requires_grad
# In place, but past the version counter by which writing is seen.
_RESHAPING = frozenset(
    ("transpose_", "t_", "swapdims_", "swapaxes_", "squeeze_", "unsqueeze_", "as_strided_", "set_", "resize_",
     "resize_as_", "apply_", "map_", "map2_")
)  # fmt: skip
_ALONE = (Tensor.__deepcopy__, Tensor.__reduce_ex__)


class _Owner(Protocol):
    def kernel_parameters(self) -> list[nn.Parameter]: ...

    def train_kernel(self, wanted: bool) -> None: ...

    def write_kernel(self, weight: Tensor) -> None: ...


class _Link:
    """Whose kernel it is, as of when."""

    def __init__(self, owner: _Owner, kernel: Tensor) -> None:
        self.owner = owner
        self.kernel = kernel  # the plain tensor: what is asked of it must not come back here
        self.note()

    def note(self) -> None:
        self.version = self.kernel._version
        self.read_at = self._owners_versions()

    def _owners_versions(self) -> list[int]:
        return [-1 if p.is_inference() else p._version for p in self.owner.kernel_parameters()]

    def was_written(self) -> bool:
        return self.kernel._version != self.version

    def write(self) -> None:
        """Give what was written into the kernel to the block."""
        if self._owners_versions() != self.read_at:
            raise RuntimeError(
                f"in-place write to a weight of {type(self.owner).__name__} that was read before its parameters "
                "changed: read `.weight` again and write to that"
            )
        with torch.no_grad():
            self.owner.write_kernel(self.kernel.detach())
        self.note()


class ComputedWeight(Tensor):
    """The kernel of a block as a tensor, for reading with gradient; what is written in place goes to the block."""

    _link: _Link
    _is_whole = False  # not a detached tensor or a view

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # nn.Parameter(conv.weight) marks its tensor so. It is a parameter of its own from then on.
        del self._link
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if isinstance(first, cls) and hasattr(first, "_link"):
            special = _special(func, first, args)
            if special is not None:
                return special.value
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            links = list({id(own._link): own._link for own in _own(args, kwargs)}.values())
            for link in links:
                if link.was_written():
                    _refuse_with_gradient(first)
                    link.write()
            return _linked(result, links)


def _refuse_with_gradient(written: Any) -> None:
    """RuntimeError for a write in place that autograd would record, as torch has it for parameters."""
    if torch.is_grad_enabled() and isinstance(written, Tensor) and written.requires_grad:
        raise RuntimeError(
            "the weight of a block is computed and requires gradients: write to it under torch.no_grad() or to its "
            "`.data`, as to a parameter"
        )


class _Special(NamedTuple):
    value: Any


def _special(func: Any, weight: Any, args: Any) -> _Special | None:
    """What is not simply computed from the values: attributes of the parameter that it stands for."""
    link = weight._link
    if getattr(func, "__name__", "") in _RESHAPING:
        raise RuntimeError(
            f"{func.__name__} cannot be done in place on the computed weight of a block; assign `.weight` instead"
        )
    if func == _data.__get__:
        return _Special(weight.detach())
    if func == _data.__set__:
        link.owner.write_kernel(args[1])
        return _Special(False)
    if func in _ALONE:
        with torch._C.DisableTorchFunctionSubclass():
            plain = weight.detach().clone().requires_grad_(weight.grad_fn is not None)
        return _Special(func(plain, *args[1:]))
    if not weight._is_whole:
        return None
    if func == _requires_grad.__get__:
        return _Special(any(parameter.requires_grad for parameter in link.owner.kernel_parameters()))
    if func in (_requires_grad.__set__, Tensor.requires_grad_):
        wanted = bool(args[1]) if len(args) > 1 else True
        link.owner.train_kernel(wanted)
        return _Special(weight)
    return None


def _own(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The computed weights among the arguments, in lists too."""
    found = []
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, ComputedWeight) and hasattr(item, "_link"):
                found.append(item)
    return found


def _linked(result: Any, links: list[_Link]) -> Any:
    """The result, in which tensors on the memory of a kernel remember it; an array on it is read-only."""
    if isinstance(result, list | tuple) and not hasattr(result, "_fields"):
        return type(result)(_linked(item, links) for item in result)
    if isinstance(result, Tensor):
        for link in links:
            if not isinstance(result, ComputedWeight) and _same_memory(result, link.kernel):
                alias = result.as_subclass(ComputedWeight)
                alias._link = link
                return alias
    elif hasattr(result, "__array_interface__") and hasattr(result, "flags"):
        result.flags.writeable = False  # numpy writes past torch, which would lose them
    return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def is_written_in_place(kernel: Tensor) -> bool:
    """Whether this call may be told from one that torch compiles, traces or transforms, where tensors stay plain."""
    return not (
        type(kernel) is not Tensor
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or kernel.is_inference()
    )


def readable_weight(owner: _Owner, kernel: Tensor) -> Tensor:
    """`kernel`, made just now for `owner`, as what its attribute `weight` gives."""
    if not is_written_in_place(kernel):
        return kernel
    weight: Any = kernel.as_subclass(ComputedWeight)
    weight._link = _Link(owner, kernel)
    weight._is_whole = True
    return weight
