"""What RepSGD and RepAdamW share: multipliers per parameter, checkpoints that hold them, one launch a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from repkern.ops import ChannelMultiplier
from repkern.ops._overlap import overlapping
from repkern.optim.grad_mult import GradMult

__all__ = ["Launch", "Mult", "RepOptimizer", "non_negative"]

#: A multiplier as the user gives it: by scales, or a tensor of the parameter's shape that is used as it is.
Mult = GradMult | Tensor

_Group = dict[str, Any]
_KEY = "grad_mults"
_LISTED = 8
_PLAIN = (Tensor, torch.nn.Parameter)  # whose memory can be asked for; a subclass may have none


def non_negative(name: str, value: float) -> None:
    """ValueError or TypeError for a setting of a parameter group that is negative, not finite or not a number."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a number of zero or more, got {value!r}")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be zero or more, got {value}")


@dataclass
class Launch:
    """Parameters of all groups that one call of the op updates. settings: what they share."""

    settings: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    multipliers: list[ChannelMultiplier | Tensor | None] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class RepOptimizer(torch.optim.Optimizer):
    """The base. Parameters and gradients as any torch.optim.Optimizer has them, and `grad_mults`."""

    # GradScaler then hands over `grad_scale` and `found_inf` instead of unscaling itself.
    _step_supports_amp_scaling = True
    #: Settings that every parameter of a launch must share; lr and weight_decay may differ.
    _shared: ClassVar[tuple[str, ...]] = ()
    #: To what power a branch's scale multiplies: 2 for SGD, 1 for AdamW.
    _power: ClassVar[int]

    def __init__(self, params: Any, defaults: _Group, grad_mults: Mapping[Any, Mult] | None) -> None:
        self._grad_mults: dict[Tensor, Mult] = {}
        self._ready: dict[Tensor, tuple[Any, ChannelMultiplier | Tensor]] = {}
        super().__init__(params, defaults)
        self._adopt({} if grad_mults is None else grad_mults)

    def _check_group(self, group: _Group) -> None:
        """ValueError for settings that cannot be."""
        for name in ("lr", "weight_decay"):
            non_negative(name, group[name])

    @property
    def grad_mults(self) -> dict[Tensor, Mult]:
        """Parameter -> its multiplier, for those that have one. A copy."""
        return dict(self._grad_mults)

    @torch._disable_dynamo  # type: ignore[misc]
    def add_param_group(self, param_group: _Group) -> None:
        """As torch's; the group may have `grad_mults` of its own. ValueError for a parameter that is there twice."""
        group = dict(param_group)
        own = group.pop(_KEY, None) or {}
        if not isinstance(group["params"], Tensor | set):  # torch has its own words for a set
            group["params"] = list(group["params"])
            _refuse_twice(group["params"])
        self._check_group({**self.defaults, **group})
        super().add_param_group(group)
        try:
            self._refuse_overlaps()
            self._adopt(own)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _refuse_overlaps(self) -> None:
        """ValueError where parameters, of any groups, share memory: one step would update it twice."""
        named = [(name, parameter) for _, name, parameter, _ in self._parameters() if type(parameter) in _PLAIN]
        found = overlapping([parameter for _, parameter in named])
        if found is not None:
            one, other = (named[at][0] for at in found)
            raise ValueError(f"{one} and {other} lie in the same memory, which one step would update twice")

    def _parameters(self) -> Iterator[tuple[int, str, Tensor, _Group]]:
        """(number as in state_dict, name for messages, parameter, group)."""
        number = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for at, parameter in enumerate(group["params"]):
                text = f"parameter {number} {tuple(parameter.shape)}"
                yield number, text if names is None else f"{names[at]} {tuple(parameter.shape)}", parameter, group
                number += 1

    def _adopt(self, grad_mults: Mapping[Any, Mult]) -> None:
        """Take over multipliers, all or none. ValueError for what is no parameter here or does not fit."""
        names = {id(parameter): name for _, name, parameter, _ in self._parameters()}
        strangers = [key for key in grad_mults if id(key) not in names]
        if strangers:
            listed = ", ".join(_describe(key) for key in strangers[:_LISTED])
            raise ValueError(
                f"{len(strangers)} of {len(grad_mults)} grad_mults are for parameters that this optimizer does not "
                f"have: {listed}{', ...' if len(strangers) > _LISTED else ''}"
            )
        problems = [
            f"{names[id(parameter)]}: {problem}"
            for parameter, mult in grad_mults.items()
            if (problem := _misfit(parameter, mult)) is not None
        ]
        if problems:
            listed = "\n  ".join(problems[:_LISTED])
            raise ValueError(f"{len(problems)} of {len(grad_mults)} grad_mults do not fit:\n  {listed}")
        self._grad_mults.update(grad_mults)

    def _multiplier(self, parameter: Tensor, group: _Group) -> ChannelMultiplier | Tensor | None:
        """What the op takes: final numbers beside the parameter, made once."""
        mult = self._grad_mults.get(parameter)
        if mult is None:
            return None
        key = (id(mult), group.get("released", False), parameter.device, parameter.dtype)
        kept = self._ready.get(parameter)
        if kept is None or kept[0] != key:
            kept = (key, _on_device(mult, parameter, self._power, key[1]))
            self._ready[parameter] = kept
        return kept[1]

    def _launches(self) -> list[Launch]:
        """Every parameter with a gradient, together with those of the same device and shared settings."""
        found: dict[Any, Launch] = {}
        for group in self.param_groups:
            settings = {name: tuple(v) if isinstance(v := group[name], list) else v for name in self._shared}
            lr, weight_decay, key = float(group["lr"]), float(group["weight_decay"]), tuple(settings.values())
            here: dict[torch.device, Launch] = {}
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients, got {grad.layout} for a parameter "
                        f"{tuple(parameter.shape)}"
                    )
                launch = here.get(parameter.device)
                if launch is None:
                    launch = found.get((parameter.device, key)) or Launch(settings)
                    here[parameter.device] = found[parameter.device, key] = launch
                launch.params.append(parameter)
                launch.grads.append(grad)
                launch.multipliers.append(self._multiplier(parameter, group))
                launch.lr.append(lr)
                launch.weight_decay.append(weight_decay)
                launch.states.append(self.state[parameter])
        flags = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        for (device, _), launch in found.items():
            for name, flag in flags.items():
                setattr(launch, name, None if flag is None else flag.to(device, non_blocking=True))
        return list(found.values())

    def _update(self, launch: Launch) -> None:
        """One step of the parameters of a launch, in place."""
        raise NotImplementedError

    @torch._disable_dynamo  # type: ignore[misc]
    @torch.no_grad()
    def _apply_gradients(self) -> None:
        for launch in self._launches():
            self._update(launch)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which computes the loss and its gradients, returns.

        Parameters without a gradient stay as they are. RuntimeError for sparse gradients. Under GradScaler gradients
        are divided by its scale, and left out when one is not finite, without waiting for the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._apply_gradients()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `grad_mults`: number of the parameter -> its multiplier, as tensors and numbers."""
        packed = super().state_dict()
        kept = ((number, self._grad_mults.get(parameter)) for number, _, parameter, _ in self._parameters())
        packed[_KEY] = {number: _packed(mult) for number, mult in kept if mult is not None}
        return packed

    @torch._disable_dynamo  # type: ignore[misc]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, multipliers included; those of this optimizer stay when `state_dict` is torch.optim's.

        ValueError, naming the first that do not match, when a parameter has another shape than it had; nothing is
        changed then.
        """
        found: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            named = [(name, parameter) for _, name, parameter, _ in self._parameters()]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            matching = dict(zip(numbers, named, strict=False))
            mults = {number: _unpacked(values) for number, values in state.get(_KEY, {}).items()}
            _check_shapes(state["state"], mults, matching)
            found.update(state=state["state"], parameters={n: p for n, (_, p) in matching.items()})
            found[_KEY] = mults if _KEY in state else None

        handle = self.register_load_state_dict_pre_hook(check)  # the last of them: it sees what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        parameters: dict[int, Tensor] = found["parameters"]
        for number, values in found["state"].items():
            if number in parameters:
                # torch gives floating state the parameter's dtype, which for half precision is less than it had.
                parameter = parameters[number]
                self.state[parameter] = {name: _restored(value, name, parameter) for name, value in values.items()}
        if found[_KEY] is not None:
            self._grad_mults = {parameters[number]: mult for number, mult in found[_KEY].items()}
            self._ready = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_grad_mults": self._grad_mults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ready = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}    grad_mults: {len(self._grad_mults)}\n)"


def _refuse_twice(params: Sequence[Any]) -> None:
    seen: set[int] = set()
    for at, item in enumerate(params):
        parameter = item[1] if isinstance(item, tuple) else item
        if id(parameter) in seen:
            raise ValueError(f"params[{at}] of the group is in it twice")
        seen.add(id(parameter))


def _describe(key: Any) -> str:
    return f"a parameter {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)


def _misfit(parameter: Tensor, mult: Any) -> str | None:
    """Why a multiplier cannot be that parameter's."""
    if isinstance(mult, GradMult):
        try:
            mult.check(parameter.shape)
        except ValueError as problem:
            return str(problem)
        return None
    if not isinstance(mult, Tensor):
        return f"a multiplier is a GradMult or a tensor, got {type(mult).__name__}"
    if mult.shape != parameter.shape:
        return f"a dense multiplier needs the parameter's shape, got {tuple(mult.shape)}"
    if not mult.is_floating_point():
        return f"a dense multiplier must be floating, got {mult.dtype}"
    if not torch.isfinite(mult).all():
        return "the dense multiplier has values that are not finite"
    return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _on_device(mult: Mult, parameter: Tensor, power: int, released: bool) -> ChannelMultiplier | Tensor:
    where: Any = {"device": parameter.device, "dtype": _wide(parameter.dtype)}
    if isinstance(mult, Tensor):
        return mult.detach().to(**where)
    scale, centre, diagonal = mult.parts(power, released=released)
    return ChannelMultiplier(scale.to(**where), None if centre is None else centre.to(**where), diagonal, mult.groups)


def _packed(mult: Mult) -> dict[str, Any]:
    return mult.to_dict() if isinstance(mult, GradMult) else {"dense": mult}


def _unpacked(values: Mapping[str, Any]) -> Mult:
    return values["dense"] if set(values) == {"dense"} else GradMult.from_dict(values)


def _restored(value: Any, name: str, parameter: Tensor) -> Any:
    if name == "step":  # a number in files of old versions of torch
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float32 if name == "step" else _wide(parameter.dtype)
    # A copy, as torch makes one: the state must not be that of whoever gave it.
    return value.detach().to(parameter.device, dtype, copy=True)


def _check_shapes(
    state: Mapping[Any, Any], mults: Mapping[int, Mult], matching: Mapping[int, tuple[str, Tensor]]
) -> None:
    problems: list[str] = []
    for number, (name, parameter) in matching.items():
        for key, value in state.get(number, {}).items():
            if isinstance(value, Tensor) and key != "step" and value.shape != parameter.shape:
                problems.append(f"{name}: its {key} is {tuple(value.shape)}")
        if number in mults and (misfit := _misfit(parameter, mults[number])) is not None:
            problems.append(f"{name}: {misfit}")
    _raise_all("the state_dict is of another model", problems)


def _raise_all(what: str, problems: Sequence[str]) -> None:
    if problems:
        listed = "\n  ".join([*problems[:_LISTED], *(["..."] if len(problems) > _LISTED else [])])
        raise ValueError(f"{what} ({len(problems)} mismatches):\n  {listed}")
