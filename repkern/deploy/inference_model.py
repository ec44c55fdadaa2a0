"""InferenceModel: what optimize_for_inference returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repkern.deploy._arena import gather_weights
from repkern.deploy.inference_conv import InferenceConv2d
from repkern.deploy.report import OptimizeReport
from repkern.nn._trees import floating_tensors, leaves, map_tensors

__all__ = ["InferenceModel", "in_order"]


class InferenceModel(nn.Module):
    """A model made fast for inference: called as the one it was made from, with the same names in its state_dict.

    report: what was chosen for every layer and why. Maps go in and out in any memory format; outputs come in that of
    the input. RuntimeError in training mode and where a gradient would be recorded.
    """

    report: OptimizeReport
    _body: nn.Module

    def __init__(
        self,
        body: nn.Module,
        report: OptimizeReport,
        *,
        parameters: Sequence[tuple[str, Any]],
        dtype: torch.dtype | None,
    ) -> None:
        """parameters: names and defaults of the arguments. dtype: that of all floating maps inside; None: as given."""
        super().__init__()
        self.report = report
        self._parameters_of_forward = tuple(parameters)
        # An argument without a default after one with a default can be given by its name only.
        required = [default is inspect.Parameter.empty for _, default in parameters]
        self._needs_names = required != sorted(required, reverse=True)
        self._dtype = dtype
        self._channels_last = report.channels_last
        # Not a submodule: its children, parameters and buffers are this module's own, under their own names.
        object.__setattr__(self, "_body", body)
        self._share()
        self.training = False

    def _share(self) -> None:
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = self._body.__dict__[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the model it was made from."""
        if self.training:
            raise RuntimeError(
                "a model of optimize_for_inference has no training mode: call eval(), or train the model it was made "
                "from"
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in floating_tensors([*args, *kwargs.values()])):
            raise RuntimeError(
                "a model of optimize_for_inference gives no gradients, but an input requires one: use the model it was "
                "made from, or torch.no_grad()"
            )
        if self.report.traced and (kwargs or self._needs_names):
            args, kwargs = in_order(self._parameters_of_forward, args, kwargs), {}
        with torch.no_grad():
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        channels_last = self._channels_last
        if channels_last and not torch.compiler.is_compiling():
            channels_last = not torch._C._are_functorch_transforms_active()  # vmap's maps have no memory formats
        if not channels_last and self._dtype is None:
            return self._body(*args, **kwargs)
        contiguous = channels_last and any(_is_nchw(leaf) for leaf in leaves((args, kwargs)))
        args, kwargs = map_tensors(lambda tensor: self._inside(tensor, channels_last), (args, kwargs))
        result = self._body(*args, **kwargs)
        if isinstance(result, Tensor):
            return self._outside(result, contiguous)
        return map_tensors(lambda tensor: self._outside(tensor, contiguous), result)

    def _inside(self, x: Tensor, channels_last: bool) -> Tensor:
        if self._dtype is not None and x.is_floating_point():
            x = x.to(self._dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x

    def _outside(self, y: Tensor, contiguous: bool) -> Tensor:
        if self._dtype is not None and y.dtype == self._dtype:
            y = y.float()
        return y.contiguous() if contiguous and y.dim() == 4 else y

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._body._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        self._body._load_from_state_dict(state_dict, prefix, *more)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # a graph that was pickled comes back with dictionaries of its own
        gather_weights(layer for layer in self.modules() if isinstance(layer, InferenceConv2d))

    def extra_repr(self) -> str:
        """How many layers use which method."""
        methods = [layer.method for layer in self.report.layers]
        return ", ".join(f"{methods.count(name)} x {name}" for name in dict.fromkeys(methods))


def _is_nchw(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dim() != 4:
        return False
    return x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)


def in_order(
    parameters: Sequence[tuple[str, Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """All arguments in order, as a graph takes them. parameters: names and defaults. TypeError for unknown names."""
    names = [name for name, _ in parameters]
    unknown = sorted(set(kwargs) - set(names[len(args) :]))
    if unknown:
        raise TypeError(f"unexpected arguments {', '.join(unknown)}; the model takes {', '.join(names)}")
    needed = [name for name, default in parameters[len(args) :] if default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in kwargs]
    if missing:
        raise TypeError(f"missing argument {', '.join(missing)}; the model takes {', '.join(names)}")
    last = max((names.index(name) for name in kwargs), default=-1)
    return *args, *(kwargs.get(name, default) for name, default in parameters[len(args) : last + 1])
