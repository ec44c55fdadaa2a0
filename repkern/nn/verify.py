"""Whether a converted model still computes the same function, judged against float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repkern.nn._surgery import copied_model, names_of_modules
from repkern.nn._trees import floating_tensors, map_tensors

__all__ = [
    "Call",
    "Difference",
    "Example",
    "Reference",
    "ReparameterizeReport",
    "arguments",
    "call_of",
    "check_in_float64",
    "check_same_function",
    "floating_tensors",
]

Example = Tensor | Sequence[Any] | Mapping[str, Any]

# How much more than the training form's own rounding error the plain form may have. The two round at different
# places; both errors are maxima over the same outputs and rarely differ by more than 3x.
_SLACK = 16
# In units of eps * max|output|, where no higher precision is at hand; also the least that is asked for.
_FEW_EPS = 32
_WITHOUT_REFERENCE = 4096


def _double(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)


def _run(model: nn.Module, call: Call) -> list[Tensor]:
    """The floating outputs in eval mode, without gradients; training flags are put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return [output.to("cpu", copy=True) for output in floating_tensors(call(model))]
    finally:
        for module, flag in training.items():
            module.training = flag


@dataclass(frozen=True)
class Difference:
    """How far a tensor of the plain model is from the training form's, at its worst element.

    name, kind: "output" and "", or a block's name and class. absolute: |plain - training form|, the latter in float64
    where it runs there. largest: the largest |value| of the tensor; relative: absolute / largest. bound: what
    `absolute` may be. index: where in the tensor.
    """

    name: str
    kind: str
    absolute: float
    largest: float
    bound: float
    index: tuple[int, ...]

    @property
    def relative(self) -> float:
        """The difference in units of the largest value."""
        if self.absolute == 0:
            return 0.0
        return self.absolute / self.largest if self.largest else float("inf")

    @property
    def within_bound(self) -> bool:
        """False also for a difference that is NaN."""
        return self.absolute <= self.bound

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values; an infinite number as a string."""
        values = asdict(self) | {"relative": self.relative, "within_bound": self.within_bound}
        return {name: str(value) if value in (math.inf, -math.inf) else value for name, value in values.items()}

    def __str__(self) -> str:
        kind = f" ({self.kind})" if self.kind else ""
        return (
            f"{self.name}{kind}: {self.absolute:.3g} at {list(self.index)}, {self.relative:.3g} of the largest value "
            f"{self.largest:.3g}, the bound is {self.bound:.3g}"
        )


@dataclass
class ReparameterizeReport:
    """What `reparameterize` did and found.

    converted: name of every block -> its class, in registration order. warnings: their texts. With verify: outputs,
    one `Difference` each; blocks, each on the input it had in the plain model, in calling order, of several calls the
    worst; in_float64: the outputs of a float64 copy of the model, converted in float64, against the same copy before.
    What is left there is no rounding of the model's own precision. Empty where float64 does not run, and for float64
    models, whose `outputs` say it.
    """

    converted: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    outputs: list[Difference] = field(default_factory=list)
    blocks: list[Difference] = field(default_factory=list)
    in_float64: list[Difference] = field(default_factory=list)

    @property
    def worst_output(self) -> Difference | None:
        """The output with the largest relative difference; None without verify."""
        return max(self.outputs, key=lambda output: output.relative, default=None)

    @property
    def worst_in_float64(self) -> Difference | None:
        """The output with the largest relative difference in float64; None where that was not compared."""
        return max(self.in_float64, key=lambda output: output.relative, default=None)

    @property
    def worst_block(self) -> Difference | None:
        """The block with the largest relative difference on its own input; None without verify."""
        return max(self.blocks, key=lambda block: block.relative, default=None)

    @property
    def first_beyond(self) -> Difference | None:
        """The first block in calling order that differs by more than its bound."""
        return next((block for block in self.blocks if not block.within_bound), None)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values (infinite differences as strings)."""
        names = ("worst_output", "worst_in_float64", "worst_block", "first_beyond")
        worst: dict[str, Difference | None] = {name: getattr(self, name) for name in names}
        return {
            "converted": self.converted,
            "warnings": self.warnings,
            "outputs": [output.as_json() for output in self.outputs],
            **{name: None if difference is None else difference.as_json() for name, difference in worst.items()},
        }

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} blocks"]
        lines += [f"  {output}" for output in self.outputs]
        lines += [f"  in float64, {output}" for output in self.in_float64]
        if self.worst_block is not None:
            lines.append(f"  worst block {self.worst_block}")
        return "\n".join(lines)


def arguments(example: Example) -> tuple[Any, ...]:
    """The example as positional arguments. TypeError for what is neither a tensor nor a sequence."""
    if isinstance(example, Tensor):
        return (example,)
    if not isinstance(example, Sequence) or isinstance(example, str):
        raise TypeError(f"the example must be a tensor or a tuple of arguments, got {type(example).__name__}")
    return tuple(example)


class Call(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """What the model returns."""
        return model(*self.args, **self.kwargs)


def call_of(example: Example) -> Call:
    """The example as a call: a tensor, a sequence of arguments, or a mapping of keyword arguments. TypeError else."""
    if isinstance(example, Call):
        return example
    if isinstance(example, Mapping):
        return Call((), {str(name): value for name, value in example.items()})
    return Call(arguments(example), {})


class Reference:
    """The outputs of the training form on an example, in its own precision and in float64 where it runs there.

    double: the float64 copy it ran in, `exact` its outputs; None both where float64 does not run or is the model's own.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.call = call_of(example)
        _raise_on_nonfinite(model)
        self.outputs = _run(model, self.call)
        if not self.outputs:
            raise ValueError("the model returns no floating-point tensor to verify")
        self.double: nn.Module | None = None
        self.exact: list[Tensor] | None = None
        if any(output.dtype is not torch.float64 for output in self.outputs):
            self._run_in_float64(model)

    def _run_in_float64(self, model: nn.Module) -> None:
        try:
            double = copied_model(model).double()
            exact = _run(double, _double(self.call))
            # A detector keeps another number of boxes after a last digit: those are not the same values.
            if [output.shape for output in exact] == [output.shape for output in self.outputs]:
                self.exact, self.double = exact, double
        except Exception:  # user code may insist on a dtype, and a device may lack float64
            self.double = self.exact = None

    def require_finite(self) -> None:
        """ValueError when the training form overflows on the example: no difference says anything then."""
        if not all(bool(torch.isfinite(output).all()) for output in self.outputs):
            raise ValueError(
                f"the training form itself gives NaN or infinite values on the example, in {self.outputs[0].dtype}; "
                "verification is meaningless"
            )

    def differences(self, outputs: Sequence[Tensor], names: Sequence[str], kind: str = "") -> list[Difference]:
        """How far `outputs` (as many as the reference's, of the same shapes, on the CPU) are from the reference."""
        if [output.shape for output in outputs] != [output.shape for output in self.outputs]:
            shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (outputs, self.outputs)]
            raise ValueError(f"the outputs have the shapes {shapes[0]}, the training form's are {shapes[1]}")
        found = []
        for at, (name, output, trained) in enumerate(zip(names, outputs, self.outputs, strict=True)):
            exact = None if self.exact is None else self.exact[at]
            wanted = trained.double() if exact is None else exact
            absolute, index = _worst(output.double() - wanted)
            found.append(Difference(name, kind, absolute, _largest(trained), _bound(trained, exact), index))
        return found


def _raise_on_nonfinite(model: nn.Module) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"NaN or infinite values in {', '.join(broken)}; verification is meaningless")


def _worst(difference: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute value and its index; infinity when there is a NaN."""
    if difference.numel() == 0:
        return 0.0, ()
    size = difference.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    at = size.argmax()
    return float(size.max()), tuple(int(i) for i in torch.unravel_index(at, size.shape))


def _largest(tensor: Tensor) -> float:
    return _worst(tensor)[0]


def _bound(output: Tensor, exact: Tensor | None) -> float:
    unit = torch.finfo(output.dtype).eps * _largest(output)
    if exact is None:
        return _WITHOUT_REFERENCE * unit
    return max(_SLACK * _largest(output.double() - exact), _FEW_EPS * unit)


def check_same_function(
    model: nn.Module,
    reference: Reference,
    block_of: dict[nn.Module, nn.Module],
    report: ReparameterizeReport,
    *,
    with_blocks: bool,
) -> None:
    """Enter into `report` how far `model` is from `reference`; ValueError beyond the training form's own rounding.

    block_of: plain module -> the block it came from. with_blocks: compare those too, which takes longer than all else;
    done in any case when an output is beyond its bound, to say which block it comes from.
    """
    outputs = _run(model, reference.call)
    report.outputs = reference.differences(outputs, _names(outputs))
    beyond = next((output for output in report.outputs if not output.within_bound), None)
    if with_blocks or beyond is not None:
        report.blocks = _compare_blocks(model, reference.call, block_of)
    if beyond is not None:
        raise ValueError(f"the plain model differs from the training form: {beyond}; {_where(report.first_beyond)}")


def check_in_float64(
    double: nn.Module, reference: Reference, block_of: dict[nn.Module, nn.Module], report: ReparameterizeReport
) -> None:
    """Enter into `report` how far the converted float64 copy `double` is from what the copy computed before.

    ValueError beyond rounding, which in float64 is far below what a wrong constant or border changes.
    """
    assert reference.exact is not None
    call = _double(reference.call)
    outputs = _run(double, call)
    if [output.shape for output in outputs] != [output.shape for output in reference.exact]:
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (outputs, reference.exact)]
        raise ValueError(f"in float64 the outputs have the shapes {shapes[0]}, the training form's are {shapes[1]}")
    unit = torch.finfo(torch.float64).eps
    for name, output, exact, trained in zip(_names(outputs), outputs, reference.exact, reference.outputs, strict=True):
        absolute, index = _worst(output - exact)
        # As many units as the training form is off in its own precision: an ill-conditioned model is so in both.
        own = _SLACK * _largest(trained.double() - exact) / torch.finfo(trained.dtype).eps
        bound = unit * max(_WITHOUT_REFERENCE * _largest(exact), own)
        report.in_float64.append(Difference(name, "", absolute, _largest(exact), bound, index))
    beyond = next((output for output in report.in_float64 if not output.within_bound), None)
    if beyond is not None:
        blocks = _compare_blocks(double, call, block_of)
        first = next((block for block in blocks if not block.within_bound), None)
        raise ValueError(
            f"the plain model differs from the training form by more than rounding, as float64 shows: {beyond}; "
            f"{_where(first)}"
        )


def _names(outputs: Sequence[Tensor]) -> list[str]:
    return [f"output {at}" for at in range(len(outputs))] if len(outputs) > 1 else ["the output"]


def _where(first: Difference | None) -> str:
    if first is None:
        return "no single block differs by itself, so something outside the blocks changed"
    return f"the first block that differs is {first}"


def _compare_blocks(model: nn.Module, call: Call, block_of: dict[nn.Module, nn.Module]) -> list[Difference]:
    """Every plain module against its block on the same input, in calling order; of several calls the worst."""
    names = names_of_modules(model)
    found: dict[nn.Module, Difference] = {}

    def compare(plain: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        block = block_of[plain]
        reference = Reference(block, Call(inputs, keywords))
        outputs = [tensor.cpu() for tensor in floating_tensors(output)]
        own = [names.get(id(plain)) or "(root)"] * len(outputs)
        worst = max(reference.differences(outputs, own, type(block).__name__), key=lambda d: d.relative)
        if plain not in found or worst.relative > found[plain].relative:
            found[plain] = worst

    handles = [plain.register_forward_hook(compare, with_kwargs=True) for plain in block_of]
    try:
        _run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())
