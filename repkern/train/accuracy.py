"""The metrics of a network on the test images of a data set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from repkern.data import DataSource
from repkern.data.batch import Shard
from repkern.train.distributed import Runtime
from repkern.train.meters import Meters
from repkern.train.recipe import TrainingRecipe
from repkern.train.task import Classification

__all__ = ["check_outputs", "evaluate"]


def check_outputs(model: nn.Module, data: DataSource) -> None:
    """ValueError unless `model` takes such images and has an output for each class."""
    parameter = next(iter(model.parameters()), torch.empty(0))
    images = torch.zeros(2, data.channels, data.image_size, data.image_size, dtype=parameter.dtype)
    was_training = model.training
    try:
        with torch.no_grad():
            scores = model.eval()(images.to(parameter.device))
    except RuntimeError as problem:
        shown = "x".join(str(size) for size in images.shape[1:])
        raise ValueError(f"the network does not take images of {shown}: {str(problem).splitlines()[0]}") from None
    finally:
        model.train(was_training)
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] != len(data.classes):
        found = scores.shape[-1] if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"the network has {found} outputs, but the data has {len(data.classes)} classes")


def evaluate(
    model: nn.Module,
    data: DataSource,
    recipe: TrainingRecipe,
    runtime: Runtime,
    *,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """ "test_loss", "test_accuracy" and, from twenty classes on, "test_top5" on all test images, in eval mode.

    progress: called with the number of images of each batch. ValueError as `check_outputs`.
    """
    check_outputs(model, data)
    task = Classification(recipe, len(data.classes))
    meters = Meters(task, "test_", runtime.device)
    model = model.to(runtime.device).eval()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for batch in data.test_batches(Shard(runtime.rank, runtime.world)):
        placed = runtime.place(batch, dtype=dtype, channels_last=recipe.train.channels_last)
        with torch.no_grad(), runtime.autocast():
            result = task.test(model, placed)
        meters.update(result, placed)
        progress(len(batch.labels))
    return meters.compute()
