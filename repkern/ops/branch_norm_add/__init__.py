"""branch_norm_add: branch maps -> normalized, summed, activated (docs/ops/branch_norm_add.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repkern.ops import _check
from repkern.ops._library import define_op
from repkern.ops.branch_norm_add.contract import (
    ACTIVATIONS,
    AS_IS,
    BATCH,
    GIVEN,
    OP,
    NormPlan,
    check_call,
    check_statistics,
    map_format,
    statistics_dtype,
)

__all__ = [
    "ACTIVATIONS",
    "Norm",
    "branch_norm_add",
    "branch_norm_add_backward",
    "branch_norm_add_flat",
    "branch_norm_statistics",
    "branch_norm_sums",
]

_STATISTICS, _SUMS = "branch_norm_statistics", "branch_norm_sums"
_FORWARD_ARGS = "Tensor[] branches, Tensor[] weights, Tensor[] biases, Tensor[] means, Tensor[] vars"
_OPTION_ARGS = "int[] modes, float[] eps, int activation"


class Norm(NamedTuple):
    """How a branch is normalized: (y - mean) / sqrt(var + eps) * weight + bias, all [C]; None: ones, zeros.

    mean, var: None for the statistics of the batch itself; given ones are constants and var is biased. eps: finite, at
    least 0.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 1e-5


def _fake_forward(branches: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    first = branches[0]
    modes = args[4]
    shape = (sum(mode == BATCH for mode in modes), first.shape[1])
    mean, var = (first.new_empty(shape, dtype=statistics_dtype(first.dtype)) for _ in range(2))
    return _fake_map(first), mean, var


def _fake_map(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=map_format(like))


def _setup_context(ctx: Any, args: Sequence[Any], output: Any) -> None:
    *tensors, modes, eps, activation = args
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(t for some in tensors for t in some), mean, var)
    ctx.lengths = [len(some) for some in tensors]
    ctx.options = (modes, eps, activation)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    lengths, (modes, eps, activation) = ctx.lengths, ctx.options
    # An empty list counts as one argument of the autograd function.
    slots = [max(length, 1) for length in lengths]
    if grad is None:
        return (None,) * (sum(slots) + 3)
    saved = ctx.saved_tensors
    lists: list[list[Tensor]] = []
    at = 0
    for length in lengths:
        lists.append(list(saved[at : at + length]))
        at += length
    made = _add_backward.call_from_autograd(grad, *lists, *saved[at:], None, None, modes, eps, activation)
    *grads, grad_weight, grad_bias = made
    norms = iter(grads)
    of_maps = [grads[-1] if mode == AS_IS else next(norms) for mode in modes]
    of_weights = list(grad_weight.unbind(0)) or [None]
    of_biases = [grad_bias] * lengths[2] or [None]
    return (*of_maps, *of_weights, *of_biases, *(None,) * (slots[3] + slots[4] + 3))


def _check_forward(*args: Any) -> NormPlan:
    return check_call(OP, *args)


def _check_with_grad(
    op: str, grad: Tensor, branches: Sequence[Tensor], tensors: Sequence[Any], options: Sequence[Any]
) -> NormPlan:
    """What the backward and the sums have in common: a call with the gradient of its output and its statistics."""
    *lists, mean, var = tensors
    plan = check_call(op, branches, *lists, *options)
    first = branches[0]
    _check.require_tensor(op, "grad", grad)
    if grad.dtype is not first.dtype or grad.device != first.device or grad.layout is not torch.strided:
        _check.require_same(op, {"branches[0]": first, "grad": grad}, (first.dtype,))
    _check.require_shape(op, "grad", grad, first.shape)
    for name, rows in (("mean", mean), ("var", var)):
        _require_statistics(op, name, rows, (plan.batch_norms, first.shape[1]), first)
    return plan


def _require_statistics(op: str, name: str, rows: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    wide = statistics_dtype(like.dtype)
    _check.require_tensor(op, name, rows)
    if rows.layout is not torch.strided:
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got layout {rows.layout}")
    if rows.dtype != wide:
        raise TypeError(f"{op}: `{name}` is {rows.dtype} but branches of {like.dtype} need {wide}; one dtype for all")
    if rows.device != like.device:
        raise ValueError(f"{op}: `{name}` is on {rows.device} but the branches are on {like.device}")
    _check.require_shape(op, name, rows, shape)


def _check_sums(grad: Tensor, branches: Sequence[Tensor], *args: Any) -> NormPlan:
    return _check_with_grad(_SUMS, grad, branches, args[:6], args[6:])


def _check_backward(grad: Tensor, branches: Sequence[Tensor], *args: Any) -> NormPlan:
    sums, count = args[6:8]
    plan = _check_with_grad(OP, grad, branches, args[:6], args[8:])
    if (sums is None) != (count is None):
        raise ValueError(f"{OP}: `sums` and `count` come together, got only {'count' if sums is None else 'sums'}")
    if sums is not None:
        _require_statistics(OP, "sums", sums, (1 + plan.norms, branches[0].shape[1]), branches[0])
        _require_statistics(OP, "count", count, (1,), branches[0])
    return plan


def _fake_sums(grad: Tensor, branches: Sequence[Tensor], *args: Any) -> Tensor:
    rows = 1 + len(args[0])
    return branches[0].new_empty((rows, branches[0].shape[1]), dtype=statistics_dtype(branches[0].dtype))


def _fake_backward(grad: Tensor, branches: Sequence[Tensor], *args: Any) -> list[Tensor]:
    weights, modes = args[0], args[8]
    maps = len(weights) + (AS_IS in modes)
    first = branches[0]
    params = weights[0].dtype if len(weights) > 0 else statistics_dtype(first.dtype)
    rows = first.new_empty((len(weights), first.shape[1]), dtype=params)
    return [*(_fake_map(first) for _ in range(maps)), rows, first.new_empty((first.shape[1],), dtype=params)]


branch_norm_add_flat = define_op(
    OP,
    OP,
    f"({_FORWARD_ARGS}, {_OPTION_ARGS}) -> (Tensor, Tensor, Tensor)",
    check=_check_forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_backward,
    constant=(1, 2),
)
_add_backward = define_op(
    OP,
    f"{OP}_backward",
    f"(Tensor grad, {_FORWARD_ARGS}, Tensor mean, Tensor var, Tensor? sums, Tensor? count, {_OPTION_ARGS}) -> Tensor[]",
    check=_check_backward,
    fake=_fake_backward,
)
_sums_op = define_op(
    OP,
    _SUMS,
    f"(Tensor grad, {_FORWARD_ARGS}, Tensor mean, Tensor var, {_OPTION_ARGS}) -> Tensor",
    check=_check_sums,
    fake=_fake_sums,
)


def _check_statistics_op(branches: Sequence[Tensor]) -> None:
    check_statistics(_STATISTICS, branches)


def _check_statistics_backward(grad_mean: Tensor, grad_var: Tensor, branches: Sequence[Tensor], mean: Tensor) -> None:
    check_statistics(_STATISTICS, branches)
    shape = (len(branches), branches[0].shape[1])
    for name, rows in (("grad_mean", grad_mean), ("grad_var", grad_var), ("mean", mean)):
        _require_statistics(_STATISTICS, name, rows, shape, branches[0])


def _fake_statistics(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    shape = (len(branches), branches[0].shape[1])
    wide = statistics_dtype(branches[0].dtype)
    return branches[0].new_empty(shape, dtype=wide), branches[0].new_empty(shape, dtype=wide)


def _fake_statistics_backward(
    grad_mean: Tensor, grad_var: Tensor, branches: Sequence[Tensor], mean: Tensor
) -> list[Tensor]:
    return [_fake_map(branches[0]) for _ in branches]


def _statistics_context(ctx: Any, args: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*args[0], output[0])


def _statistics_gradients(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Any, ...]:
    *branches, mean = ctx.saved_tensors
    return tuple(_statistics_backward.call_from_autograd(grad_mean, grad_var, branches, mean))


_statistics = define_op(
    OP,
    _STATISTICS,
    "(Tensor[] branches) -> (Tensor, Tensor)",
    check=_check_statistics_op,
    fake=_fake_statistics,
    setup_context=_statistics_context,
    backward=_statistics_gradients,
)
_statistics_backward = define_op(
    OP,
    f"{_STATISTICS}_backward",
    "(Tensor grad_mean, Tensor grad_var, Tensor[] branches, Tensor mean) -> Tensor[]",
    check=_check_statistics_backward,
    fake=_fake_statistics_backward,
)


def _flat(
    branches: Sequence[Tensor], norms: Sequence[Norm | None], activation: str
) -> tuple[tuple[list[Tensor], ...], tuple[list[int], list[float], int]]:
    """The lists and the options of the flat form; missing weights filled in, parameters brought to one dtype."""
    branches = _check.require_tensors(OP, "branches", branches)
    norms = _check_norms(norms)
    if len(norms) != len(branches):
        raise ValueError(
            f"{OP}: one entry of `norms` a branch is needed, got {len(norms)} for {len(branches)} branches"
        )
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: `activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    modes: list[int] = []
    eps: list[float] = []
    lists: tuple[list[Any], ...] = ([], [], [], [])  # weights, biases, means, vars
    for b, norm in enumerate(norms):
        modes.append(AS_IS if norm is None else BATCH if norm.mean is None else GIVEN)
        if norm is None:
            continue
        if (norm.mean is None) != (norm.var is None):
            raise ValueError(f"{OP}: norm {b} has only one of `mean` and `var`; give both, or none for the batch's own")
        eps.append(_check.require_number(OP, f"norms[{len(modes) - 1}].eps", norm.eps, 0))
        lists[0].append(norm.weight)
        lists[1].append(norm.bias)
        if norm.mean is not None:
            lists[2].append(norm.mean)
            lists[3].append(norm.var)
    return (branches, *_of_one_dtype(branches, lists)), (modes, eps, ACTIVATIONS.index(activation))


def _check_norms(norms: Any) -> list[Norm | None]:
    if isinstance(norms, Norm | Tensor | str) or not isinstance(norms, Sequence):
        raise TypeError(f"{OP}: `norms` must be a list of Norm or None, got {type(norms).__name__}")
    for b, norm in enumerate(norms):
        if norm is None:
            continue
        if not isinstance(norm, Norm):
            raise TypeError(f"{OP}: `norms[{b}]` must be a Norm or None, got {type(norm).__name__}")
        for name, value in zip(Norm._fields[:4], norm, strict=False):
            _check.require_tensor(OP, f"norms[{b}].{name}", value, optional=True)
    return list(norms)


def _of_one_dtype(branches: Sequence[Tensor], lists: Sequence[list[Any]]) -> list[list[Tensor]]:
    found = {t.dtype for values in lists for t in values if t is not None}
    missing = any(t is None for t in (*lists[0], *lists[1]))  # `None in` would ask every tensor whether it equals None
    if not branches or (len(found) == 1 and not missing):
        return list(lists)
    first = branches[0]
    wide = statistics_dtype(first.dtype)
    dtype = found.pop() if len(found) == 1 else wide
    if not first.is_floating_point():
        return list(lists)  # for the check to name
    size = first.shape[1:2]
    filled = [
        [first.new_full(size, value, dtype=dtype) if t is None else t for t in values]
        for values, value in zip(lists[:2], (1.0, 0.0), strict=True)
    ]
    # Parameters of both allowed dtypes; any other is left for the check to name.
    return [[t.to(wide) if t.dtype in (wide, first.dtype) else t for t in v] for v in (*filled, *lists[2:])]


def branch_norm_add(
    branches: Sequence[Tensor], norms: Sequence[Norm | None], activation: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """activation(sum over b of norm_b(y_b)) without writing a normalized map. Differentiable in maps, weights, biases.

    branches: 1 to 16 maps y_b [N, C, H, W] of one shape, device and dtype (float32, float64, bfloat16, float16),
    contiguous or channels_last as the first is; one tensor may stand for several. norms: one `Norm` a branch, None to
    add it as it is; its tensors [C] in the maps' dtype or, for half precision, in float32.
    activation: one of `ACTIVATIONS`.
    Returns out like a branch, and the mean and biased variance, both [B0, C] in float32 (float64 for float64 maps), of
    the branches normalized with the batch's own statistics, in order; those two are not differentiable.
    Batch normalization: arXiv 1502.03167, Alg. 1; the sum of normed branches: RepVGG (2101.03697), Sec. 3.
    Raises ValueError or TypeError for what does not fit together, an empty map, and, as torch's BatchNorm does, one
    value per channel with batch statistics.
    """
    lists, options = _flat(branches, norms, activation)
    return branch_norm_add_flat(*lists, *options)


def branch_norm_statistics(branches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over N, H, W of every map: two [B, C]. Differentiable.

    branches: as in `branch_norm_add`. float32 for half precision, else the maps' dtype.
    """
    return _statistics(_check.require_tensors(_STATISTICS, "branches", branches))


def branch_norm_sums(
    grad: Tensor,
    branches: Sequence[Tensor],
    norms: Sequence[Norm | None],
    mean: Tensor,
    var: Tensor,
    activation: str = "none",
) -> Tensor:
    """[1 + Bn, C]: the sum of dz over N, H, W, then that of dz * xhat_b of every branch with a norm.

    dz = grad * activation'(z). mean, var [B0, C]: of the branches without given statistics. What a synchronized
    BatchNorm adds up over all processes in its backward; this process's rows are its gradients of bias and weights.
    """
    for name, tensor in (("grad", grad), ("mean", mean), ("var", var)):
        _check.require_tensor(_SUMS, name, tensor)
    lists, options = _flat(branches, norms, activation)
    return _sums_op(grad, *lists, mean, var, *options)


def branch_norm_add_backward(
    grad: Tensor,
    branches: Sequence[Tensor],
    norms: Sequence[Norm | None],
    mean: Tensor,
    var: Tensor,
    activation: str = "none",
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of every branch, of the weights [Bn, C] and of each bias [C], for grad like a branch.

    mean, var [B0, C]: those of `branch_norm_add`, or of a larger batch together with `sums` as `branch_norm_sums`
    gives, added up over that batch, and `count` [1], its values per channel; gradients of weights and bias are then
    those of the larger batch.
    """
    for name, tensor in (("grad", grad), ("mean", mean), ("var", var)):
        _check.require_tensor(OP, name, tensor)
    for name, given in (("sums", sums), ("count", count)):
        _check.require_tensor(OP, name, given, optional=True)
    lists, options = _flat(branches, norms, activation)
    *grads, grad_weight, grad_bias = _add_backward(grad, *lists, mean, var, sums, count, *options)
    each = iter(grads)
    return [grads[-1] if mode == AS_IS else next(each) for mode in options[0]], grad_weight, grad_bias
