"""The training engine: a state machine over steps that every way of training shares.

A run that is killed at any moment and resumed computes, bit for bit, what it would have computed in one go: its
position is two numbers (batches are functions of seed, epoch and step), and a checkpoint holds everything else.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repkern.data import DataSource, DataWorkerError
from repkern.models.structure import changes_between
from repkern.train import state
from repkern.train.callbacks import Callback, StructureChanged, check_names, gradients_of
from repkern.train.checkpoint import CheckpointError
from repkern.train.distributed import Runtime, explained
from repkern.train.divergence import TrainingDivergedError, check_weights, clip_gradients, diverged
from repkern.train.evaluation import epoch_row, evaluate
from repkern.train.meters import Meters
from repkern.train.optimizers import follow_structure
from repkern.train.prepared import prepared
from repkern.train.recipe import TrainingRecipe
from repkern.train.reproducible import deterministic
from repkern.train.saving import Saving
from repkern.train.schedule import Schedule
from repkern.train.sharded import require_whole
from repkern.train.signals import Interrupted, StopNow, StopRequest, stop_requests
from repkern.train.snapshot import BufferSnapshot
from repkern.train.state import Position
from repkern.train.task import Classification, Result, Task

__all__ = ["Interrupted", "Trainer", "TrainingDivergedError"]


class Trainer:
    """Trains `model` on `data` as `recipe` says. `fit` does it all, `resume` before it continues from `folder`.

    task: the loss and the metrics; None: `Classification`. optimizers: by name, "weights" is the one that the schedule
    and clipping are for; None: that of the recipe. folder: for metrics and checkpoints, None to keep nothing.
    runtime: processes and device; None: a new one, which `close` or the end of a `with` block ends.

    Attributes: `model` (the bare network, whatever wraps it), `optimizers`, `average` (a moving average or None),
    `position`, `rows` (one for each epoch), `skipped` (steps given up because the loss was not finite).
    ValueError for a batch that cannot be divided among the processes, and for callbacks with equal names.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DataSource,
        recipe: TrainingRecipe,
        *,
        task: Task | None = None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
        callbacks: Sequence[Callback] = (),
        folder: Path | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        check_names(callbacks)
        self._own_runtime = runtime is None
        self.runtime = runtime or Runtime(recipe.train)
        self.recipe, self.data, self.callbacks = recipe, data, list(callbacks)
        self.shard = self.runtime.part_of(data.batch_size, recipe.train.accumulate)
        self.model = self.placed(model)
        self.origin = state.outline(self.model)
        self.optimizers, self.average = prepared(self.model, recipe, self.runtime, optimizers)
        self.task = task or Classification(recipe, len(data.classes))
        self.position = Position()
        self.rows: list[dict[str, Any]] = []
        self.skipped = self.skipped_in_a_row = 0
        self.elapsed_before = 0.0
        self._began = time.monotonic()
        self._saving = Saving(folder, recipe.checkpoint, main=self.runtime.is_main, say=self.note)
        self._schedule = Schedule(
            self.optimizers["weights"], recipe.schedule, steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        self._request = StopRequest()
        self.meters: Meters | None = None
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._wrapped: nn.Module | None = None

    def placed(self, model: nn.Module) -> nn.Module:
        """`model` itself, on the device and in the memory format of this training."""
        model.to(self.runtime.device)
        if self.recipe.train.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    # Where it is -------------------------------------------------------------------------------------------------

    @property
    def epochs(self) -> int:
        """How many there will be; the last may be cut short by `max_steps`."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch."""
        return self.data.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        steps, most = self.recipe.train.epochs * self.steps_per_epoch, self.recipe.train.max_steps
        return min(steps, most) if most else steps

    @property
    def epoch(self) -> int:
        """Whole epochs that are done."""
        return self.position.epoch

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.position.step

    @property
    def saved(self) -> Path | None:
        """The newest checkpoint that this run wrote or continued from."""
        return self._saving.last

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch >= self.epochs

    def elapsed(self) -> float:
        """Seconds of this epoch so far, those before an interruption included."""
        return self.elapsed_before + time.monotonic() - self._began

    def _steps_of_this_epoch(self) -> int:
        return min(self.steps_per_epoch, self.total_steps - self.epoch * self.steps_per_epoch)

    # The training ------------------------------------------------------------------------------------------------

    def fit(self) -> list[dict[str, Any]]:
        """Train to the end; returns one row of metrics for each epoch.

        Raises Interrupted when a signal arrived (all is saved then), TrainingDivergedError when loss or weights do not
        stay finite, CheckpointError for a folder that cannot be written to or that holds later checkpoints,
        DistributedError when another process died.
        """
        settings = self.recipe.train
        with explained(), contextlib.ExitStack() as stack:
            if settings.deterministic or settings.threads:
                stack.enter_context(deterministic(settings.threads or None, algorithms=settings.deterministic))
            stack.callback(self._end)
            self._request = stack.enter_context(stop_requests())
            try:
                self._begin()
                self._run()
            except KeyboardInterrupt:
                raise Interrupted("SIGINT", self.position, self._saving.last) from None
        return self.rows

    def _run(self) -> None:
        try:
            while not self.done:
                self._run_epoch()
        except StopNow:
            if self._saving.last is None or self._saving.last != self._saving.path(self.step):
                self.save()
            raise Interrupted(self._request.name or "a signal", self.position, self._saving.last) from None

    def _begin(self) -> None:
        problem = self.runtime.broadcast(self._saving.begin(self.step, self.rows))
        if problem:
            raise CheckpointError(problem)
        self._wrap()
        self._began = time.monotonic()
        self._emit("on_fit_start")

    def _wrap(self) -> None:
        self._wrapped = None  # before the new one: two wrappers would both hook the parameters
        self._wrapped = self.runtime.wrap(self.model)
        self._schedule.set(self.step)
        self._buffers = BufferSnapshot(self.model)
        if self.average is not None:
            self.average.attach(self.model)

    def _end(self) -> None:
        self._emit("on_fit_end")
        self._wrapped = None
        self._request = StopRequest()

    def _run_epoch(self) -> None:
        self._train_mode()
        if self.meters is None:
            self.meters = Meters(self.task, "train_", self.runtime.device)
        batches = self.data.train_batches(self.epoch, self.position.step_in_epoch, self.shard)
        try:
            while self.position.step_in_epoch < self._steps_of_this_epoch():
                self._run_step(batches)
        finally:
            getattr(batches, "close", lambda: None)()
        self._end_epoch()

    def _train_mode(self) -> None:
        self.model.train()
        for module in self.model.modules() if self.recipe.train.frozen_norms else ():
            if isinstance(module, _BatchNorm):
                module.eval()

    def _run_step(self, batches: Iterator[Any]) -> None:
        self._emit("on_step_begin")
        self._buffers.take()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        try:
            results = [self._piece(next(batches, None), index) for index in range(self.shard.accumulate)]
        except DataWorkerError:
            # Schedulers send a signal to all processes of a job: it may end the workers before it is seen here.
            if not self._request or self.runtime.world > 1:
                raise
            self._buffers.put_back()
            raise StopNow from None
        finite = all(math.isfinite(result.loss.item()) for result, _ in results)
        bad, stop, due = self.runtime.agree([not finite, bool(self._request), self._saving.due(self.step + 1)])
        if bad:
            self._skip("the loss")
        elif not self._update(results):
            self._skip("the gradient")
        epoch, in_epoch, step = self.position
        self.position = Position(epoch, in_epoch + 1, step + 1)
        self._schedule.set(self.step)
        self._emit("on_step_end")
        if stop:
            raise StopNow
        # At the end of an epoch the checkpoint waits for the test.
        if due and self.position.step_in_epoch < self._steps_of_this_epoch() and not self.skipped_in_a_row:
            self.save()

    def _piece(self, batch: Any, index: int) -> tuple[Result, Any]:
        """Forward and backward of one part of this process's part of a batch."""
        assert self._wrapped is not None
        if batch is None:
            raise RuntimeError(
                f"the data ended at step {self.position.step_in_epoch + 1} of epoch {self.epoch + 1}, which should "
                f"have {self.steps_per_epoch} steps of {self.shard.accumulate} batches"
            )
        batch = self.place(batch)
        pieces = self.shard.accumulate
        with self.runtime.piece(self._wrapped, last=index == pieces - 1):
            with self.runtime.autocast():
                result = self.task.loss(self._wrapped, batch)
            self.runtime.backward(result.loss / pieces if pieces > 1 else result.loss)
        return result._replace(loss=result.loss.detach()), batch

    def _update(self, results: Sequence[tuple[Result, Any]]) -> bool:
        """Step the optimizers; False, and nothing is stepped, when the norm of the gradient is known and not finite."""
        optimizers = list(self.optimizers.values())
        self.runtime.unscale(optimizers)
        self.runtime.average(gradients_of(self.callbacks))
        self._emit("on_gradients")
        # An fp16 gradient that overflowed is the scaler's affair: it leaves the step out and scales less.
        if not clip_gradients(self.optimizers["weights"], self.recipe.train) and not self.runtime.scaler_state():
            return False
        self.runtime.step(optimizers)
        self.runtime.update_scale()
        self.skipped_in_a_row = 0
        if self.average is not None:
            self.average.update(self.step + 1)
        assert self.meters is not None
        for result, batch in results:
            self.meters.update(result, batch)
        return True

    def _skip(self, what: str) -> None:
        """Give this step up: nothing is updated, and the statistics of norms are put back."""
        self._buffers.put_back()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.skipped_in_a_row += 1
        check_weights(self)
        if self.skipped_in_a_row >= self.recipe.train.max_bad_steps:
            raise diverged(self, f"{what} was not finite {self.skipped_in_a_row} times in a row")
        self.note(f"step {self.step + 1}: {what} is not finite; the step is skipped ({self.skipped} so far)")

    def place(self, batch: Any) -> Any:
        """`batch` on the device, floating tensors in the dtype that the weights began with."""
        return self.runtime.place(batch, dtype=self._dtype, channels_last=self.recipe.train.channels_last)

    # The end of an epoch -----------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        check_weights(self)
        assert self.meters is not None
        rate = self._schedule.rate(self.epoch * self.steps_per_epoch)
        row = epoch_row(self, self.meters, rate, self._steps_of_this_epoch(), self._stop_alone)
        self._emit("on_epoch_end", row)
        self.position = Position(self.epoch + 1, 0, self.step)
        self.meters, self.elapsed_before, self._began = None, 0.0, time.monotonic()
        self.rows.append(row)
        self._saving.write_rows(self.rows)
        self._emit("on_epoch_logged", row)
        if self.done or self.epoch % self.recipe.checkpoint.every_epochs == 0:
            self.save(metric=row.get(self.task.best))
        if self.runtime.agree([bool(self._request)])[0] and not self.done:
            raise StopNow

    def evaluate(self) -> dict[str, float]:
        """The metrics of the test set, in eval mode; of the moving average where there is one. The mode is put back."""
        return evaluate(self)

    def _stop_alone(self) -> None:
        # With other processes an early end would leave them waiting; the end of the epoch looks again.
        if self._request and self.runtime.world == 1:
            raise StopNow

    # Checkpoints -------------------------------------------------------------------------------------------------

    def save(self, metric: float | None = None) -> Path | None:
        """Write a checkpoint of now; None when there is no folder, or when it could not be written (a note says why).

        metric: of the epoch that just ended, when one did. Every process calls it, and goes on when rank 0 has written.
        TrainingDivergedError for weights that are not finite.
        """
        if not self._saving.active:
            return None
        check_weights(self)
        ended = self.epoch if self.position.step_in_epoch == 0 and self.epoch > 0 else None
        checkpoint = state.capture(self, {"epoch": ended, "metric": metric})
        path = self.runtime.on_main(lambda: self._saving.write(self.step, checkpoint))
        self._saving.last = path or self._saving.last
        if path is not None and self.runtime.is_main:
            self._emit("on_saved", path)
        return path

    def resume(self) -> Position:
        """Continue from the newest checkpoint in the folder that is whole; returns its position, 0s without one.

        A damaged one is named in a note and the one before it used. CheckpointError when all are damaged, and when it
        is of another network or of other settings.
        """
        # Rank 0 reads for all: hosts need not share a disk.
        found = self.runtime.on_main(self._saving.newest)
        if found is None:
            return self.position
        step, checkpoint = found
        self.position = state.restore(self, checkpoint)
        self._saving.last = self._saving.path(step)
        self._saving.write_rows(self.rows)
        return self.position

    def meters_state(self) -> dict[str, Any]:
        """What the metrics of the current epoch have summed up in this process, {} between epochs."""
        return {} if self.meters is None else self.meters.state()

    # What surrounds it -------------------------------------------------------------------------------------------

    def structure_changed(self, change: StructureChanged) -> None:
        """Say that modules of `model` were replaced: optimizer, schedule, moving average and wrappers follow.

        To be called between two steps (in on_step_begin, on_step_end or on_epoch_end), by every process alike.
        ValueError for a module that a checkpoint cannot describe: it could not be resumed.
        """
        require_whole(self.model)
        self.placed(self.model)
        self.runtime.share_weights(self.model)  # new modules may have drawn their first weights
        if self._saving.active:
            changes_between(self.model, self.origin)
        follow_structure(self.optimizers["weights"], self.model, change, self.recipe)
        if self.average is not None:
            self.average.follow(self.model, change)
            self.placed(self.average.module)
        self._train_mode()
        if self._wrapped is not None:
            self._wrap()
        self._emit("on_structure_changed", change)

    def note(self, text: str) -> None:
        """Tell the callbacks of rank 0 something that a person should know."""
        if self.runtime.is_main:
            self._emit("on_note", text)

    def _emit(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def close(self) -> None:
        """Leave the group of processes, when this trainer joined it."""
        self._wrapped = None
        if self._own_runtime:
            self.runtime.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
