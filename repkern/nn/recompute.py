"""Maps that are made again in the backward instead of being kept."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Recompute", "Tape", "current_tape"]

_Make = Callable[[Tensor], Tensor]
_Places = list[tuple[dict[str, Any], str, Any]]
_local = threading.local()


class Tape:
    """What the norms inside a recorded `make` did, in order, so that its replay does the same and updates nothing.

    replaying: whether `next` gives the entries instead of `note` taking them. impure: set where a module was called
    that may change its state, so that the map must be kept after all.
    """

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.replaying = False
        self.impure = False
        self._at = 0

    def note(self, entry: Any) -> None:
        """Record one norm's doing."""
        self.entries.append(entry)

    def next(self) -> Any:
        """What the norm at this place did when it was recorded."""
        self._at += 1
        return self.entries[self._at - 1]

    @contextlib.contextmanager
    def running(self, replaying: bool) -> Iterator[None]:
        """This thread's norms read or write this tape."""
        before = current_tape()
        self.replaying, self._at, _local.tape = replaying, 0, self
        try:
            yield
        finally:
            _local.tape = before


def current_tape() -> Tape | None:
    """The tape of the `make` that this thread records or replays."""
    return getattr(_local, "tape", None)


class _Kept:
    """A tensor that lives anyway. Saved-tensor hooks switch torch's own check for in-place changes off."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def get(self) -> Tensor:
        _require_version(self.tensor, self.version)
        return self.tensor


class _Slot:
    """A saved tensor that is not kept: its place in the recipe, and its value between a replay and its last use."""

    __slots__ = ("__weakref__", "address", "given", "place", "recipe", "users", "value", "version")

    def __init__(self, recipe: _Recipe, place: int, tensor: Tensor) -> None:
        self.recipe, self.place = recipe, place
        self.address, self.version = tensor.data_ptr(), tensor._version
        self.value: Tensor | None = tensor
        self.users, self.given = 0, 0

    def wanted(self) -> _Slot:
        """Count one more operation that saves this tensor."""
        self.users += 1
        return self

    def fill(self, value: Tensor) -> None:
        """Put in what the replay made, or found again: then it must be as it was."""
        if value.data_ptr() == self.address:
            _require_version(value, self.version)
        self.value = value

    def get(self) -> Tensor:
        value = self.value
        if value is None:
            self.recipe.replay()
            value = self.value
            assert value is not None
        self.given += 1
        if self.given >= self.users:
            self.given = 0
            if not self.recipe.kept_after_all:
                self.value = None
        return value


def _require_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "recompute: one of the tensors needed for gradient computation has been modified by an inplace operation: "
            f"shape {tuple(tensor.shape)}, version {tensor._version}, expected {version}"
        )


class _Recipe:
    """`make(x)` once with its result, and again when the backward asks for a tensor it did not keep."""

    def __init__(self, make: _Make, x: Tensor, parameters: _Places) -> None:
        self._parameters = parameters
        self._make, self._x, self._requires_grad = make, _Kept(x.detach()), x.requires_grad
        self._storage = x.untyped_storage().data_ptr()
        self._tape = Tape()
        self._device = x.device.type
        self._autocast = _autocast_state(self._device)
        self._kept: list[_Kept] = []  # parameters
        self._slots: list[weakref.ref[_Slot]] = []
        self._saved = 0
        self.kept_after_all = False

    def record(self, x: Tensor) -> tuple[Tensor, _Slot]:
        """The map with its graph, and the slot of its value."""
        with self._tape.running(replaying=False), saved_tensors_hooks(self._pack, _unpack):
            y = self._make(x)
        output = _Slot(self, -1, y.detach())
        self._slots.append(weakref.ref(output))
        if self._tape.impure:
            self.kept_after_all = True
        else:
            self._empty()
        return y, output

    def _pack(self, tensor: Tensor) -> _Kept | _Slot:
        self._saved += 1
        if isinstance(tensor, nn.Parameter):
            self._kept.append(_Kept(tensor))
            return self._kept[-1]
        if tensor.untyped_storage().data_ptr() == self._storage:
            return _Kept(tensor)
        slot = _Slot(self, self._saved - 1, tensor)
        self._slots.append(weakref.ref(slot))
        return slot

    def _empty(self) -> None:
        for reference in self._slots:
            slot = reference()
            if slot is not None:
                slot.value = None

    def replay(self) -> None:
        """Fill every slot that somebody still holds."""
        for kept in self._kept:
            kept.get()
        x = self._x.get()
        slots = [slot for slot in (reference() for reference in self._slots) if slot is not None]
        made: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            made.append(tensor.detach())  # with its graph it would keep itself alive: the graph holds this hook

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._tape.running(replaying=True))
            stack.enter_context(_in_place(self._parameters))
            if self._autocast != _autocast_state(self._device):
                enabled, dtype, cache = self._autocast
                stack.enter_context(torch.autocast(self._device, dtype, enabled, cache))
            if len(self._slots) == 1:  # the map alone: nothing inside it was dropped
                stack.enter_context(torch.no_grad())
            else:
                stack.enter_context(torch.enable_grad())
                stack.enter_context(saved_tensors_hooks(pack, _never))
                x = x.detach().requires_grad_(self._requires_grad)
            y = self._make(x).detach()
        if len(self._slots) > 1 and len(made) != self._saved:
            raise RuntimeError(
                f"recompute: the branch saved {self._saved} tensors in the forward but {len(made)} when it was made "
                "again; it must be the same function of its input both times"
            )
        for slot in slots:
            slot.fill(y if slot.place < 0 else made[slot.place])


def _places(owner: nn.Module | None) -> _Places:
    """Where the parameters of a module and of those inside are, and which they are now."""
    if owner is None:
        return []
    return [
        (module._parameters, name, parameter)
        for module in owner.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


@contextlib.contextmanager
def _in_place(parameters: _Places) -> Iterator[None]:
    """The parameters where they were: torch.func.functional_call has put others back by the time of a backward."""
    changed = [(place, name, place[name]) for place, name, own in parameters if place.get(name, own) is not own]
    for place, name, own in parameters if changed else ():
        if name in place:
            place[name] = own
    try:
        yield
    finally:
        for place, name, other in changed:
            place[name] = other


def _unpack(packed: _Kept | _Slot) -> Tensor:
    return packed.get()


def _never(packed: None) -> Tensor:
    raise RuntimeError("recompute: the graph of a replay has no backward of its own")


def _autocast_state(device: str) -> tuple[bool, torch.dtype | None, bool]:
    if not torch.amp.autocast_mode.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False, None, False
    return True, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()


class Recompute:
    """Maps made with `make` and whatever is computed with them under `dropping()` keep no copy for the backward.

    The backward makes each map once more, from the input, and serves all who need it from that one replay; parameters
    or an input that were changed in place meanwhile are a RuntimeError. A `make` must be a function of its input alone
    (no random numbers) whose norms go through `branch_norm_sum` and `norm_scale_shift`. owner: the module whose
    parameters it uses.
    """

    def __init__(self, owner: nn.Module | None = None) -> None:
        self._parameters = _places(owner)
        self._outputs: dict[tuple[Any, ...], _Slot] = {}

    @staticmethod
    def possible(x: Tensor) -> bool:
        """Whether there is a backward to save for, and nobody else (checkpointing, an outer recipe) decides that."""
        if not torch.is_grad_enabled() or x.is_inference() or current_tape() is not None:
            return False
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is None

    def make(self, make: _Make, x: Tensor) -> Tensor:
        """make(x)."""
        y, output = _Recipe(make, x, self._parameters).record(x)
        if y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            self._outputs[_key(y)] = output
        return y

    def dropping(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, a map made by this object is saved for the backward as its recipe."""
        return saved_tensors_hooks(self._pack, _unpack) if self._outputs else contextlib.nullcontext()

    def _pack(self, tensor: Tensor) -> _Kept | _Slot:
        slot = self._outputs.get(_key(tensor))
        return _Kept(tensor) if slot is None else slot.wanted()


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
