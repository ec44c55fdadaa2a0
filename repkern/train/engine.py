"""The training loop that every trainer shares: epochs, callbacks, evaluation, metrics, checkpoints, resuming.

A run that is interrupted and resumed computes, bit for bit, what it would have computed in one go: a checkpoint holds
the weights, the optimizer, the schedule, the data order and every random number generator. Ctrl-C costs at most the
epoch it falls into.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from repkern.train.checkpoint import CheckpointError, CheckpointFolder
from repkern.train.data import BatchSource
from repkern.train.metrics import MetricsLog
from repkern.train.reproducible import random_state, restore_random_state

__all__ = ["Callback", "Interrupted", "Trainer", "TrainingDivergedError"]


class Interrupted(Exception):  # not an error: a request that was honoured
    """Ctrl-C arrived. `epoch` is the last finished one; training continues after it."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"interrupted after epoch {epoch}")
        self.epoch = epoch


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite."""


class Callback:
    """Override what is needed. A callback with state gives it in `state_dict` and is told apart by `name`."""

    name = ""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first epoch of this call of `fit`; `trainer.epoch` epochs are already done."""

    def on_gradients(self, trainer: Trainer) -> None:
        """After the backward pass, before the optimizer step."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After each optimizer step."""

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After evaluation, before the checkpoint. Values added to `row` are logged."""

    def on_epoch_saved(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After the metrics and the checkpoint of the epoch were written: from here on it is not lost."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only: it is read back without unpickling code."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


class Trainer:
    """Trains `model` on `data` for `epochs` epochs.

    `loss(outputs, labels)` returns a scalar; `scheduler` is stepped after every optimizer step. With a `folder`,
    metrics and checkpoints go there and `resume` continues from the newest one.
    """

    def __init__(
        self,
        model: nn.Module,
        data: BatchSource,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scheduler: LRScheduler | None = None,
        callbacks: Sequence[Callback] = (),
        folder: Path | None = None,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        names = [callback.name for callback in callbacks if callback.state_dict()]
        if len(set(names)) < len(names) or "" in names:
            raise ValueError(f"callbacks with state need names of their own, got {names}")
        self.model, self.data, self.optimizer, self.scheduler = model, data, optimizer, scheduler
        self.epochs, self.loss, self.callbacks = epochs, loss, list(callbacks)
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []
        self._log: MetricsLog | None = None
        self._checkpoints: CheckpointFolder | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._log = MetricsLog(folder)
            self._checkpoints = CheckpointFolder(folder / "checkpoints")

    def resume(self) -> int:
        """Continue from the newest checkpoint in the folder; returns its epoch, 0 when there is none.

        Raises CheckpointError when it is damaged or of another model.
        """
        if self._checkpoints is None or self._log is None or not self._checkpoints.epochs():
            return 0
        newest = self._checkpoints.epochs()[-1]
        state = self._checkpoints.load(newest, self.model)
        try:
            self._log.resume(newest)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.data.load_state_dict(state["data"])
            for callback in self.callbacks:
                if callback.name in state["callbacks"]:
                    callback.load_state_dict(state["callbacks"][callback.name])
            restore_random_state(state["random"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self._checkpoints.path(newest)} does not fit this run: {error}") from error
        self.epoch, self.rows = newest, self._log.rows
        return newest

    def fit(self) -> list[dict[str, Any]]:
        """Train until `epochs` are done; returns one row of metrics per epoch.

        Raises Interrupted on Ctrl-C and TrainingDivergedError when the loss is not finite.
        """
        for callback in self.callbacks:
            callback.on_fit_start(self)
        try:
            while self.epoch < self.epochs:
                row = self._one_epoch()
                for callback in self.callbacks:
                    callback.on_epoch_end(self, row)
                self._finish_epoch(row)
                for callback in self.callbacks:
                    callback.on_epoch_saved(self, row)
        except KeyboardInterrupt:
            raise Interrupted(self.epoch) from None
        return self.rows

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and accuracy over the test batches, in eval mode; the mode is put back."""
        was_training = self.model.training
        self.model.eval()
        loss, right, count = 0.0, 0, 0
        for inputs, labels in self.data.test_batches():
            outputs = self.model(inputs)
            loss += self.loss(outputs, labels).item() * len(labels)
            right += int((outputs.argmax(1) == labels).sum())
            count += len(labels)
        self.model.train(was_training)
        return {"test_loss": loss / count, "test_accuracy": right / count}

    def _one_epoch(self) -> dict[str, Any]:
        began = time.perf_counter()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.model.train()
        total: torch.Tensor | float = 0.0
        right: torch.Tensor | int = 0
        count = 0
        for inputs, labels in self.data.train_batches():
            self.optimizer.zero_grad()
            outputs = self.model(inputs)
            loss = self.loss(outputs, labels)
            loss.backward()
            for callback in self.callbacks:
                callback.on_gradients(self)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            # Summed on the device: reading a value at each step would make a GPU wait.
            total = total + loss.detach().double() * len(labels)
            right = right + (outputs.detach().argmax(1) == labels).sum()
            count += len(labels)
            for callback in self.callbacks:
                callback.on_step_end(self)
        epoch, mean = self.epoch + 1, float(total) / max(count, 1)
        if not math.isfinite(mean):
            raise TrainingDivergedError(
                f"the loss is {mean} in epoch {epoch}; lower the learning rate ({learning_rate:g})"
            )
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": learning_rate}
        row.update(train_loss=mean, train_accuracy=int(right) / max(count, 1))
        row.update(self.evaluate())
        row["seconds"] = round(time.perf_counter() - began, 3)
        return row

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        # Metrics first: a checkpoint without its row could not be resumed, a row without its checkpoint is dropped.
        if self._log is not None:
            self._log.append(row)
            self.rows = self._log.rows
        else:
            self.rows.append(row)
        if self._checkpoints is not None:
            self._checkpoints.save(row["epoch"], self.model, self._state(row["epoch"]))
        self.epoch = row["epoch"]

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {} if self.scheduler is None else self.scheduler.state_dict(),
            "data": self.data.state_dict(),
            "callbacks": {c.name: c.state_dict() for c in self.callbacks if c.state_dict()},
            "random": random_state(),
        }
