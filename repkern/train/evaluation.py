"""The end of an epoch: the test of the network, and the row of metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from repkern.data.batch import Shard
from repkern.train.meters import Meters
from repkern.train.sharded import whole_weights

if TYPE_CHECKING:
    from repkern.train.trainer import Trainer

__all__ = ["epoch_row", "evaluate"]


def epoch_row(trainer: Trainer, meters: Meters, rate: float, steps: int, between: Callable[[], None]) -> dict[str, Any]:
    """The row of the epoch whose `steps` steps were just done, tested where the recipe says so."""
    epoch = trainer.epoch + 1
    row: dict[str, Any] = {"epoch": epoch, "step": trainer.step, "learning_rate": rate}
    row.update(meters.nothing() if meters.empty else meters.compute())
    if trainer.skipped:
        row["skipped_steps"] = trainer.skipped
    trained = trainer.elapsed()
    if epoch == trainer.epochs or epoch % trainer.recipe.train.eval_every == 0:
        row.update(evaluate(trainer, between))
    row["seconds"] = round(trainer.elapsed(), 3)
    row["images_per_second"] = round(steps * trainer.data.batch_size / max(trained, 1e-9), 1)
    return row


@torch.no_grad()
def evaluate(trainer: Trainer, between: Callable[[], None] = lambda: None) -> dict[str, float]:
    """What `Trainer.evaluate` says; `between` is called after every batch and may raise to end it."""
    model = trainer.model if trainer.average is None else trainer.average.module
    trainer.runtime.share_buffers(model)
    # Module by module: some of a network in training may be in eval mode (frozen norms, frozen stages).
    modes = [(module, module.training) for module in model.modules()]
    meters = Meters(trainer.task, "test_", trainer.runtime.device)
    model.eval()
    try:
        with whole_weights(model):
            for batch in trainer.data.test_batches(Shard(trainer.runtime.rank, trainer.runtime.world)):
                placed = trainer.place(batch)
                with trainer.runtime.autocast():
                    result = trainer.task.test(model, placed)
                meters.update(result, placed)
                between()
    finally:
        for module, training in modes:
            module.training = training
    return meters.compute()
