"""All that a training is at one moment, and how it is put back: structure first, because the rest is named by it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from repkern.models.structure import apply_changes, changes_between
from repkern.train.checkpoint import Checkpoint, CheckpointError
from repkern.train.meters import Meters
from repkern.train.optimizers import load_optimizer, optimizer_state
from repkern.train.recipe_compare import recipe_differences
from repkern.train.reproducible import random_state, restore_random_state
from repkern.train.sharded import is_sharded, part_like, whole

if TYPE_CHECKING:
    from repkern.train.trainer import Trainer

__all__ = ["Position", "capture", "outline", "restore"]


class Position(NamedTuple):
    """Where a training is: whole epochs done, steps done in the one after them, steps done in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


def outline(model: nn.Module) -> nn.Module:
    """A copy without data, on the meta device: what later structures are compared with."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def named_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Every trained tensor by name: those of the model, and "CALLBACK:NAME" for those of callbacks."""
    named: dict[str, Tensor] = dict(trainer.model.named_parameters())
    for callback in trainer.callbacks:
        named |= {f"{callback.name}:{name}": tensor for name, tensor in callback.named_parameters().items()}
    return named


def capture(trainer: Trainer, notes: Mapping[str, Any]) -> Checkpoint:
    """The state of `trainer` between two steps. Every process calls it; that of rank 0 is whole."""
    named, main = named_tensors(trainer), trainer.runtime.is_main
    state: dict[str, Any] = {
        "position": list(trainer.position),
        "optimizers": whole({name: optimizer_state(o, named) for name, o in trainer.optimizers.items()}, main),
        "scaler": trainer.runtime.scaler_state(),
        "callbacks": {c.name: s for c in trainer.callbacks if (s := c.state_dict())},
        "random": trainer.runtime.gather(random_state()),
        "meters": trainer.runtime.gather(trainer.meters_state()),
        "bad_steps": [trainer.skipped, trainer.skipped_in_a_row],
        "elapsed": trainer.elapsed(),
        "rows": [dict(row) for row in trainer.rows],
        "recipe": trainer.recipe.model_dump(mode="json"),
        "data": trainer.data.describe(),
        "threads": torch.get_num_threads(),
    }
    average = None if trainer.average is None else whole(trainer.average.module.state_dict(), main)
    # FSDP2 gives modules classes of its own, and their structure stays.
    changes = {} if is_sharded(trainer.model) else changes_between(trainer.model, trainer.origin)
    return Checkpoint({"changes": changes}, whole(trainer.model.state_dict(), main), average, state, notes)


def restore(trainer: Trainer, checkpoint: Checkpoint) -> Position:
    """Put `checkpoint` into `trainer`, in the order that names need. CheckpointError when it is of another training."""
    state = checkpoint.state
    try:
        _check_same(trainer, state)
        _restore_networks(trainer, checkpoint)
        _restore_callbacks(trainer, state["callbacks"])
        named = named_tensors(trainer)
        for name, optimizer in trainer.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name], named)
        trainer.runtime.load_scaler_state(state["scaler"])
        _restore_meters(trainer, state["meters"])
        trainer.skipped, trainer.skipped_in_a_row = state["bad_steps"]
        trainer.rows = [dict(row) for row in state["rows"]]
        trainer.elapsed_before = float(state["elapsed"])
        _restore_random(trainer, state["random"])
        _compare_pieces(trainer, state["recipe"]["train"]["accumulate"] * len(state["random"]))
        threads = trainer.recipe.train.threads or torch.get_num_threads()
        if state["threads"] != threads:
            trainer.note(
                f"saved with {state['threads']} CPU threads, continued with {threads}: the last bits of sums can "
                "differ from those of an uninterrupted run"
            )
        return Position(*state["position"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the checkpoint does not fit this training: {error}") from error


def _restore_networks(trainer: Trainer, checkpoint: Checkpoint) -> None:
    changes = checkpoint.structure["changes"]
    networks: list[tuple[nn.Module, Mapping[str, Tensor]]] = [(trainer.model, checkpoint.weights)]
    if (trainer.average is None) != (checkpoint.average is None):
        raise ValueError("one of the two has a moving average of the weights (ema), the other has none")
    if trainer.average is not None and checkpoint.average is not None:
        networks.append((trainer.average.module, checkpoint.average))
    if changes and is_sharded(trainer.model):
        raise ValueError("its network changed during training, which strategy fsdp2 cannot follow; use strategy ddp")
    for network, weights in networks:
        if changes:
            apply_changes(network, changes)
            trainer.placed(network)
        else:
            _check_weights(network, weights)
        own = network.state_dict()
        network.load_state_dict({name: part_like(tensor, own[name]) for name, tensor in weights.items()}, strict=True)
    if trainer.average is not None:
        trainer.average.module.eval().requires_grad_(False)


def _restore_callbacks(trainer: Trainer, states: Mapping[str, Any]) -> None:
    present = {callback.name: callback for callback in trainer.callbacks if callback.name}
    missing = [name for name in states if name not in present]
    if missing:
        raise ValueError(f"it holds the state of {', '.join(missing)}, a callback that this training lacks")
    for name, callback in present.items():
        if name in states:
            callback.load_state_dict(states[name])
        elif callback.state_dict():
            trainer.note(f"the checkpoint has no state of the callback {name}, which begins anew")


def _restore_meters(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    trainer.meters = None
    if any(states):
        trainer.meters = Meters(trainer.task, "train_", trainer.runtime.device)
        trainer.meters.load(states, trainer.runtime.rank, trainer.runtime.world)


def _check_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Before anything is copied: load_state_dict would leave half of a foreign network behind."""
    own = network.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            where = "checkpoint" if name in weights else "network"
            raise ValueError(f"only the {where} has {name}")
        if own[name].shape != weights[name].shape:
            raise ValueError(f"{name} is {list(weights[name].shape)}, the network has {list(own[name].shape)}")


def _restore_random(trainer: Trainer, states: list[Any]) -> None:
    if len(states) == trainer.runtime.world:
        restore_random_state(states[trainer.runtime.rank])
        return
    trainer.note(
        f"saved by {len(states)} processes, continued by {trainer.runtime.world}: the order of the images stays, "
        "random numbers drawn inside the network (dropout) and statistics of norms over a part of a batch do not"
    )


def _compare_pieces(trainer: Trainer, before: int) -> None:
    """Norms see one piece of a batch at a time, and mixup finds partners inside it."""
    now = trainer.shard.world * trainer.shard.accumulate
    if now != before:
        trainer.note(
            f"a batch was computed in {before} pieces, and is now in {now}: statistics of norms and the partners of "
            "mixed images are within a piece, so results will differ from those of an uninterrupted run"
        )


def _check_same(trainer: Trainer, state: Mapping[str, Any]) -> None:
    if state["optimizers"].keys() != trainer.optimizers.keys():
        saved, own = (", ".join(names) for names in (state["optimizers"], trainer.optimizers))
        raise ValueError(f"it holds the optimizers {saved}, this training has {own}")
    differing = recipe_differences(state["recipe"], trainer.recipe.model_dump(mode="json"))
    differing += [f"data: {line}" for line in recipe_differences(state["data"], trainer.data.describe())]
    if differing:
        raise CheckpointError(
            f"the checkpoint is of a run with other settings: {'; '.join(differing[:6])}"
            f"{f' and {len(differing) - 6} more' if len(differing) > 6 else ''}"
        )
