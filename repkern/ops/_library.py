"""The op table, and how an op becomes a torch op: define, implement, fake, autograd.

Every op is registered from Python on a torch-free native module. The autograd kernel is our own instead of
`torch.library.register_autograd`, which costs 80 µs on an op that takes ten tensors (measured); this costs 10.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd  # stable since torch 1.10; what torch.library uses itself

from repkern import _native
from repkern.ops import _check, _select, _transforms

__all__ = ["OPS", "Native", "Op", "define_op"]

_LIBRARY = torch.library.Library("repkern", "DEF")
_MODULE_OF = {
    "reference": "reference",
    "triton": "triton",
    "cpu": "native",
    "cuda": "native",
    "simt": "native",
}


@dataclass(frozen=True)
class Native:
    """What a native implementation gets: the module, the suffix of its entry points and the stream to use."""

    module: Any
    suffix: str  # "cpu" or "cuda": the entry points are <op>_<pass>_<suffix>
    backend: str

    def function(self, name: str) -> Callable[..., Any]:
        """The entry point `<name>_<suffix>`."""
        return getattr(self.module, f"{name}_{self.suffix}")

    def workspace_size(self, name: str) -> Callable[..., int]:
        """The function that says how many bytes of workspace `name` needs."""
        return getattr(self.module, f"{name}_{self.suffix}_workspace")

    def stream(self, device: torch.device) -> int:
        """The current CUDA stream as an integer; 0 on the host."""
        return torch.cuda.current_stream(device).cuda_stream if self.backend == "cuda" else 0


@dataclass(frozen=True)
class Op:
    """One row of the op table.

    `check` raises ValueError or TypeError for anything that must not reach a kernel; it runs before every backend
    and in the fake implementation. What it returns (a plan worked out from the shapes, or None) goes to the native
    implementation. `implementation(backend)` is the function `name` in repkern/ops/<stem>/<module>.py.
    """

    stem: str
    name: str
    overload: Any
    check: Callable[..., Any]
    differentiable: bool = True
    mutates: tuple[int, ...] = ()  # the arguments changed in place; their version counters go up
    backends: tuple[str, ...] = _select.BACKENDS
    constant: tuple[int, ...] = ()  # the outputs that have no gradient

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The function that runs this op on `backend`: (*args) as in the schema, for native ones (plan, *args)."""
        key = (self.name, backend)
        if key not in _implementations:
            module = importlib.import_module(f"repkern.ops.{self.stem}.{_MODULE_OF[backend]}")
            function = getattr(module, self.name)
            if _MODULE_OF[backend] == "native":
                native = Native(_native.load(backend), "cpu" if backend == "cpu" else "cuda", backend)
                function = _bind_native(function, native)
            _implementations[key] = function
        return _implementations[key]

    def __call__(self, *args: Any) -> Any:
        """Call through the torch dispatcher."""
        return self.overload(*args)

    def call_from_autograd(self, *args: Any) -> Any:
        """For autograd formulas: past the dispatcher where nothing would see the difference but the clock."""
        return self.run(*args) if _is_ordinary(args) else self.overload(*args)

    def run(self, *args: Any) -> Any:
        """Check, choose a backend, run it: what the dispatcher ends up calling for tensors with data."""
        return self._run(self.check(*args), *args)

    def prepare(self, plan: Any, *args: Any) -> Callable[..., Any] | None:
        """For arguments that `check` has seen, with its plan: what `prepare_<op>` of the native file gives on the CPU.

        That is a function of the maps alone. None for another backend, and for ops without one.
        """
        if _select.choose(self.name, _first_tensor(args).device.type, self.backends) != "cpu":
            return None
        module = importlib.import_module(f"repkern.ops.{self.stem}.native")
        function = getattr(module, f"prepare_{self.name}", None)
        if function is None:
            return None
        return function(Native(_native.load("cpu"), "cpu", "cpu"), plan, *map(_check.in_memory, args))

    def run_checked(self, plan: Any, *args: Any) -> Any:
        """As `run`, for arguments whose shapes, dtypes and devices `check` has seen, with the plan it gave."""
        return self._run(plan, *map(_check.in_memory, args))

    def _run(self, plan: Any, *args: Any) -> Any:
        backend = _select.choose(self.name, _first_tensor(args).device.type, self.backends)
        implementation = self.implementation(backend)
        answer = implementation(plan, *args) if _MODULE_OF[backend] == "native" else implementation(*args)
        if self.mutates and backend != "reference" and not torch.is_inference_mode_enabled():
            for argument in self.mutates:
                torch.autograd.graph.increment_version(args[argument])
        return answer


OPS: dict[str, Op] = {}
_implementations: dict[tuple[str, str], Callable[..., Any]] = {}


def _bind_native(function: Callable[..., Any], native: Native) -> Callable[..., Any]:
    return lambda *args: function(native, *args)


def _first_tensor(args: Sequence[Any]) -> torch.Tensor:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0]
    raise ValueError("at least one tensor is needed")


def define_op(
    stem: str,
    name: str,
    schema: str,
    *,
    check: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    inference_only: str | None = None,
    mutates: tuple[int, ...] = (),
    backends: tuple[str, ...] = _select.BACKENDS,
    constant: tuple[int, ...] = (),
) -> Op:
    """Register `repkern::<name>` and add it to the op table.

    `fake(*args)` returns empty outputs of the right shape. `setup_context(ctx, args, output)` and
    `backward(ctx, *grads) -> one gradient (or list) per argument` make it differentiable; without them it is a backward
    op, and where it is differentiated again its reference runs instead. `inference_only` says what to use instead where
    a gradient would be recorded, which is then a RuntimeError. `mutates`: the arguments that the op changes in place,
    as the schema says; such an op returns nothing and refuses gradients too. `backends`: those the op is
    written for. `constant`: the outputs without a gradient, as `setup_context` marks them.
    """
    if mutates:
        inference_only = "call it under torch.no_grad()"
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = Op(
        stem, name, getattr(torch.ops.repkern, name).default, check, inference_only is None, mutates, backends, constant
    )
    OPS[name] = op

    def run_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    _LIBRARY.impl(name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"repkern::{name}", run_fake, lib=_LIBRARY)
    torch.library.register_vmap(f"repkern::{name}", _transforms.looped(op), lib=_LIBRARY)
    if backward is not None and setup_context is not None:
        _LIBRARY.impl(name, _autograd_kernel(op, setup_context, backward), "Autograd")
    elif inference_only is not None:
        _LIBRARY.impl(name, _refuse_gradients(op, inference_only), "Autograd")
    else:
        _LIBRARY.impl(name, _reference_where_differentiated(op), "Autograd")
    return op


def _reference_where_differentiated(op: Op) -> Callable[..., Any]:
    """Second derivatives: under create_graph a backward op runs as its reference, which torch can differentiate."""

    def kernel(*args: Any) -> Any:
        flat, _ = _flatten(args)
        if _is_differentiated(flat) or _transforms.has_tangent(flat):
            return _run_reference(op, args)
        with _AutoDispatchBelowAutograd():
            return op.overload(*args)

    return kernel


def _is_differentiated(flat: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in flat)


def _run_reference(op: Op, args: Sequence[Any]) -> Any:
    """The op in plain torch, which torch differentiates and transforms any number of times."""
    op.check(*args)
    answer = op.implementation("reference")(*args)
    if not op.constant:
        return answer
    return type(answer)(a.detach() if at in op.constant else a for at, a in enumerate(answer))


def _refuse_gradients(op: Op, instead: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        flat, _ = _flatten(args)
        if _is_differentiated(flat) or _transforms.has_tangent(flat):
            raise RuntimeError(f"{op.name} has no gradient; {instead}")
        with _AutoDispatchBelowAutograd():
            return op.overload(*args)

    return kernel


_ORDINARY_TYPES = {torch.Tensor, torch.nn.Parameter}


def _is_ordinary(args: Sequence[Any]) -> bool:
    """Whether nobody watches this call: no gradient to record, no mode, no profiler, no subclass, no lazy tensor.

    A call through the dispatcher to an implementation in Python costs 20 to 25 µs, as much as a small layer's kernel.
    """
    if torch.is_grad_enabled() or torch.autograd._profiler_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for arg in args:
        # The types of a list first: an optimizer's step hands over hundreds of tensors.
        listed = isinstance(arg, list) and arg and type(arg[0]) not in (int, float)
        kinds = set(map(type, arg)) if listed else {type(arg)}
        for kind in kinds - _ORDINARY_TYPES:
            if issubclass(kind, torch.Tensor):
                return False
        if kinds <= _ORDINARY_TYPES and _check.any_lazy(arg if listed else (arg,)):
            return False
    return True


def _flatten(args: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """Tensor lists spread out, since autograd.Function only tracks tensors that are arguments of their own."""
    flat: list[Any] = []
    lengths: list[int | None] = []
    for arg in args:
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], torch.Tensor):
            flat.extend(arg)
            lengths.append(len(arg))
        else:
            flat.append(arg)
            lengths.append(None)
    return flat, lengths


def _unflatten(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    args: list[Any] = []
    at = 0
    for length in lengths:
        args.append(flat[at] if length is None else list(flat[at : at + length]))
        at += length or 1
    return args


def _autograd_kernel(op: Op, setup_context: Callable[..., None], backward_of: Callable[..., Any]) -> Callable[..., Any]:
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lengths: list[int | None], *flat: Any) -> Any:
            args = _unflatten(flat, lengths)
            with _AutoDispatchBelowAutograd():
                output = op.call_from_autograd(*args)
            setup_context(ctx, args, output)
            return output if isinstance(output, torch.Tensor) else tuple(output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            per_argument, _ = _flatten(backward_of(ctx, *grads))
            return (None, *per_argument)

    def kernel(*args: Any) -> Any:
        flat, lengths = _flatten(args)
        if _transforms.has_tangent(flat):
            return _run_reference(op, args)
        if _is_differentiated(flat):
            if torch._C._are_functorch_transforms_active():
                # An autograd.Function of tensors that a transform has wrapped would hide them from the outer ones.
                return _run_reference(op, args)
            output = Differentiable.apply(lengths, *flat)
            return list(output) if isinstance(output, tuple) else output
        with _AutoDispatchBelowAutograd():
            return op.overload(*args)

    return kernel
