"""Whether a converted model still computes the same function, judged against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repkern.nn._surgery import names_of_modules
from repkern.nn.block import RepBlock

__all__ = ["Example", "Reference", "check_same_function"]

Example = Tensor | Sequence[Any]

# How much more than the training form's own rounding error the plain form may have. The two round at different
# places; both errors are maxima over the same outputs and rarely differ by more than 3x.
_SLACK = 16
# In units of eps * max|output|, where no higher precision is at hand; also the least that is asked for.
_FEW_EPS = 32
_WITHOUT_REFERENCE = 4096


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_double(item) for item in value)
    return value


def _run(model: nn.Module, args: Sequence[Any]) -> list[Tensor]:
    """The floating outputs in eval mode, without gradients; training flags are put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return [output.to("cpu", copy=True) for output in _tensors(model(*args))]
    finally:
        for module, flag in training.items():
            module.training = flag


class Reference:
    """The outputs of the training form on an example, in its own precision and in float64 where it runs there."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        _raise_on_nonfinite(model)
        self.args: Sequence[Any] = (example,) if isinstance(example, Tensor) else tuple(example)
        self.outputs = _run(model, self.args)
        if not self.outputs:
            raise ValueError("reparameterize: the model returns no floating-point tensor to verify")
        self.exact = self._in_float64(model)

    def _in_float64(self, model: nn.Module) -> list[Tensor] | None:
        if all(output.dtype is torch.float64 for output in self.outputs):
            return None
        try:
            return _run(copy.deepcopy(model).double(), _double(self.args))
        except Exception:  # user code may insist on a dtype, and a device may lack float64
            return None


def _raise_on_nonfinite(model: nn.Module) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"reparameterize: NaN or infinite values in {', '.join(broken)}; verification is meaningless")


def _largest(difference: Tensor) -> float:
    """The largest absolute value; infinity when there is a NaN."""
    if difference.numel() == 0:
        return 0.0
    value = float(difference.abs().max())
    return float("inf") if value != value else value


def _bound(output: Tensor, exact: Tensor | None) -> float:
    unit = torch.finfo(output.dtype).eps * _largest(output)
    if exact is None:
        return _WITHOUT_REFERENCE * unit
    return max(_SLACK * _largest(output.double() - exact), _FEW_EPS * unit)


def check_same_function(model: nn.Module, reference: Reference, plain_of: dict[nn.Module, RepBlock]) -> None:
    """ValueError unless `model` gives the reference's outputs, up to the rounding the training form itself shows."""
    outputs = _run(model, reference.args)
    for at, (plain, trained) in enumerate(zip(outputs, reference.outputs, strict=True)):
        exact = None if reference.exact is None else reference.exact[at]
        bound = _bound(trained, exact)
        difference = _largest(plain.double() - (trained.double() if exact is None else exact))
        if not difference <= bound:
            output = f"output {at}" if len(outputs) > 1 else "the output"
            where = _first_difference(model, reference, plain_of)
            raise ValueError(
                f"reparameterize: the plain model differs from the training form: {output} by {difference:.3g} "
                f"(largest value {_largest(trained):.3g}), the bound is {bound:.3g}; {where}"
            )


def _first_difference(model: nn.Module, reference: Reference, plain_of: dict[nn.Module, RepBlock]) -> str:
    """In words, the first plain module in calling order that differs from its block on the same input."""
    names = names_of_modules(model)
    found: list[str] = []

    def compare(plain: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        block = Reference(plain_of[plain], args)
        bound = _bound(block.outputs[0], None if block.exact is None else block.exact[0])
        wanted = block.outputs[0] if block.exact is None else block.exact[0]
        difference = _largest(output.double() - wanted.double())
        if not difference <= bound:
            name, kind = names[id(plain)] or "(root)", type(plain_of[plain]).__name__
            found.append(f"the first block that differs is {name} ({kind}), by {difference:.3g}, beyond {bound:.3g}")

    handles = [plain.register_forward_hook(compare) for plain in plain_of]
    try:
        _run(model, reference.args)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no single block differs by itself, so something outside the blocks changed"
