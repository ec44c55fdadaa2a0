"""What code outside the engine can do during a training: watch it, change gradients, change the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from repkern.train.trainer import Trainer

__all__ = ["Callback", "StructureChanged", "check_names", "gradients_of"]


@dataclass(frozen=True)
class StructureChanged:
    """Says that modules of `trainer.model` were replaced, for everything that follows the network.

    paths: dotted names of the modules that are new, "" for the whole network.
    replay: makes the same change on another network of the old structure (the moving average); without it the new
    modules are copied there.
    state: optimizer state of new parameters, as that optimizer keeps it; others start with none.
    """

    paths: tuple[str, ...]
    replay: Callable[[nn.Module], None] | None = None
    state: Mapping[nn.Parameter, dict[str, Any]] = field(default_factory=dict)


class Callback:
    """Override what is needed. A callback with state gives it in `state_dict` and is told apart by `name`."""

    name = ""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first step of this call of `fit`; `trainer.step` steps are already done."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before the forward pass of each step."""

    def on_gradients(self, trainer: Trainer) -> None:
        """After the backward pass of a whole batch: gradients are unscaled, averaged and not yet clipped."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After each step, also of one that was skipped; `trainer.step` counts it already."""

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After the test, before the row is logged and the epoch is saved. Values added to `row` are logged."""

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After the row of an epoch was written."""

    def on_saved(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written: up to here nothing is lost any more."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """When `fit` ends, however it ends."""

    def on_structure_changed(self, trainer: Trainer, change: StructureChanged) -> None:
        """After the optimizers, the moving average and the wrappers follow a change of the network."""

    def on_note(self, trainer: Trainer, text: str) -> None:
        """Something that a person should know: a step that was skipped, a checkpoint that could not be written."""

    def named_parameters(self) -> Mapping[str, Tensor]:
        """Trained tensors that are not in the model, by name (such as the alpha of a search)."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only: it is read back without unpickling code."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. The network has the structure it was saved with by then."""


def check_names(callbacks: Sequence[Callback]) -> None:
    """ValueError unless callbacks with state have names of their own."""
    names = [callback.name for callback in callbacks if callback.state_dict() or callback.named_parameters()]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"callbacks with state need names of their own, got {names}")


def gradients_of(callbacks: Sequence[Callback]) -> list[Tensor]:
    """Those of the callbacks' own trained tensors, which no wrapper of the network knows."""
    tensors = [tensor for callback in callbacks for tensor in callback.named_parameters().values()]
    return [tensor.grad for tensor in tensors if tensor.grad is not None]
