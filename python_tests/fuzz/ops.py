"""Random calls of every op: python python_tests/fuzz/ops.py --calls 100000 --seed 1 (see harness.py).

Each case takes one op of the table or one public function, sizes, a dtype, an instruction set and layouts of its
tensors; half of them get one argument that is extreme, of another kind, or of another form. What is not refused must
match the reference in float64 within the computed bound, forward and backward.
"""

from __future__ import annotations

import sys
from typing import Any

import harness
import torch
from calls import FLAT, PUBLIC
from mutations import in_some_layout, mutated
from torch import Tensor
from verify import Recorder, changed, check_call

from repkern import _native
from repkern.ops import OPS, _select, use_backend
from repkern.testing.inputs import map_tensors

_ISAS = ("scalar", "avx2", "avx512", "amx")


def _backend(rng: Any) -> str:
    """One of this machine; for the CPU's own kernels any instruction set that it has."""
    if _select.why_not("cpu", "cpu") is not None or rng.random() < 0.08:
        return "reference"
    module = _native.load("cpu")
    best = _ISAS.index(module.build_info()["isa_found"])
    module.set_isa(rng.choice(_ISAS[: best + 1]))
    return "cpu"


def _flat_case(rng: Any, name: str) -> str:
    op = OPS[name]
    args = FLAT[name](rng)
    strange = rng.random() < 0.5
    if not op.mutates:
        args = tuple(map_tensors(arg, lambda t: in_some_layout(rng, t)) for arg in args)
    for _ in range(rng.choice((1, 1, 2)) if strange else 0):
        args = mutated(rng, args)
    if name == "orepa_squeeze_many" and isinstance(args[2], int):
        return "left to torch"  # reads it as a number of a dtype, and any out of range crashes before the op is called
    before = map_tensors(args, lambda t: t.clone()) if op.mutates else args
    with torch.no_grad():
        outputs = op(*args)
    given = [t for t in _all_tensors(args)]
    if any(t.device.type == "meta" for t in given):
        return "passed shapes only"
    check_call(name, before, changed(op, args) if op.mutates else _listed(outputs))
    return "matched though strange" if strange else "matched"


def _all_tensors(args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(args, lambda t: found.append(t) or t)
    return found


def _listed(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs or [])


def _public_case(rng: Any, name: str) -> str:
    function, args, kwargs, differentiable = PUBLIC[name](rng)
    strange = rng.random() < 0.6
    if strange:
        args, kwargs = mutated(rng, [args, kwargs])
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            args, kwargs = [], {}
    train = differentiable and rng.random() < 0.5
    if train:
        args, kwargs = (map_nested(tree, _trained) for tree in (args, kwargs))
    recorder = Recorder()
    with torch.enable_grad() if train else torch.no_grad():
        if name.endswith("_"):  # an optimizer's step: once
            with recorder:
                function(*args, **kwargs)
            return "matched though strange" if strange else "matched"
        outputs = function(*args, **kwargs)  # past the dispatcher where that is possible
        with recorder:
            again = function(*args, **kwargs)
            differentiated = [t for t in _listed(again) if isinstance(t, Tensor) and t.requires_grad]
            if differentiated:
                outer = [in_some_layout(rng, torch.randn_like(t)) for t in differentiated]
                torch.autograd.backward(differentiated, outer)
    for one, two in zip(_listed(outputs), _listed(again), strict=True):
        assert one.device.type == "meta" or torch.equal(one.isnan(), two.isnan()), f"{name}: NaN in one of two calls"
        assert one.device.type == "meta" or torch.equal(one.nan_to_num(), two.nan_to_num()), f"{name}: other bits"
    return "matched though strange" if strange else "matched"


def _trained(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def map_nested(tree: Any, change: Any) -> Any:
    """`change` of every tensor in nested lists, tuples, named tuples and dicts."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_nested(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [map_nested(value, change) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def case(rng: Any) -> str:
    """One call."""
    torch.set_num_threads(rng.choice((1, 1, 1, 1, 1, 1, 1, 2)))
    with use_backend(_backend(rng)):
        if rng.random() < 0.5:
            return _flat_case(rng, rng.choice(sorted(FLAT)))
        return _public_case(rng, rng.choice(sorted(PUBLIC)))


if __name__ == "__main__":
    sys.exit(harness.main(__file__, case))
