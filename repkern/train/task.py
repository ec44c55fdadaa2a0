"""What is learned: the loss of a batch, and the metrics. The engine knows nothing of classes or labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from repkern.data.errors import MissingExtraError
from repkern.nn import custom_l2
from repkern.train.recipe import TrainingRecipe

__all__ = ["Classification", "Result", "Task"]


class Result(NamedTuple):
    """loss: the scalar to minimize, with its graph. outputs: whatever `Task.update` wants to see. count: samples."""

    loss: Tensor
    outputs: Any
    samples: int


class Task:
    """Base class: what the engine asks for. Metrics are torchmetrics', which sum over batches and processes."""

    #: The key of a row whose highest value is the best checkpoint.
    best = "test_accuracy"

    def loss(self, model: nn.Module, batch: Any) -> Result:
        """Of a training batch."""
        raise NotImplementedError

    def test(self, model: nn.Module, batch: Any) -> Result:
        """Of a test batch, without gradients; as `loss` unless it says otherwise."""
        return self.loss(model, batch)

    def metrics(self, prefix: str) -> Any:
        """A torchmetrics.MetricCollection; `prefix` begins the names of its values ("train_", "test_")."""
        raise NotImplementedError

    def update(self, metrics: Any, result: Result, batch: Any) -> None:
        """Count one batch in. `result.loss` has no graph any more."""
        raise NotImplementedError


class Classification(Task):
    """Cross-entropy of labels or mixed labels, with label smoothing, auxiliary heads and RepVGG's custom L2.

    A network may give a tensor of logits [N, classes], or, with auxiliary heads in training, several (a sequence, or a
    mapping, the main one first or called "out"). Accuracy against mixed labels is that of the largest part.
    ValueError for outputs of another shape, TypeError for what is no tensor.
    """

    def __init__(self, recipe: TrainingRecipe, classes: int) -> None:
        self._recipe, self._classes = recipe.loss, classes
        self._decay = recipe.optimizer.weight_decay
        self._top = 5 if classes >= 20 else 0

    def loss(self, model: nn.Module, batch: Any) -> Result:
        """Mean over the batch; the custom L2 is added."""
        outputs, others = _heads(model(batch.images))
        loss = self._cross_entropy(outputs, batch.labels)
        for other in others if self._recipe.auxiliary else ():
            loss = loss + self._recipe.auxiliary * self._cross_entropy(other, batch.labels)
        if self._recipe.custom_l2:
            loss = loss + self._decay / 2 * custom_l2(model)
        return Result(loss, outputs.detach(), len(batch.labels))

    def test(self, model: nn.Module, batch: Any) -> Result:
        """The cross-entropy alone, with the same label smoothing, so that curves can be compared."""
        outputs, _ = _heads(model(batch.images))
        return Result(self._cross_entropy(outputs, batch.labels), outputs, len(batch.labels))

    def _cross_entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if outputs.dim() != 2 or outputs.shape[1] != self._classes:
            # On a GPU a label without an output ends the process, with a message that names neither.
            raise ValueError(
                f"the network must give [N, {self._classes}], an output for each class of the data, got "
                f"{list(outputs.shape)}"
            )
        if labels.is_floating_point():
            labels = labels.to(outputs.dtype)
        return functional.cross_entropy(outputs, labels, label_smoothing=self._recipe.label_smoothing)

    def metrics(self, prefix: str) -> Any:
        """loss, accuracy, and top5 from twenty classes on; as parts of one."""
        try:
            from torchmetrics import MetricCollection
            from torchmetrics.classification import MulticlassAccuracy

            from repkern.train.mean import SampleMean
        except ImportError as error:
            raise MissingExtraError(f"training needs torchmetrics ({error}): pip install 'repkern[train]'") from None
        parts: dict[str, Any] = {
            "loss": SampleMean(),
            "accuracy": MulticlassAccuracy(self._classes, average="micro", validate_args=False),
        }
        if self._top:
            parts["top5"] = MulticlassAccuracy(self._classes, average="micro", top_k=self._top, validate_args=False)
        return MetricCollection(parts, prefix=prefix, compute_groups=False)

    def update(self, metrics: Any, result: Result, batch: Any) -> None:
        """Count one batch in."""
        labels = batch.labels.argmax(1) if batch.labels.is_floating_point() else batch.labels
        metrics["loss"].update(result.loss, result.samples)
        for name in ("accuracy", "top5") if self._top else ("accuracy",):
            metrics[name].update(result.outputs, labels)


def _heads(outputs: Any) -> tuple[Tensor, list[Tensor]]:
    """(logits, those of auxiliary heads)."""
    if isinstance(outputs, Tensor):
        return outputs, []
    if isinstance(outputs, Mapping):
        main = outputs["out"] if "out" in outputs else next(iter(outputs.values()))
        return main, [value for value in outputs.values() if value is not main]
    if isinstance(outputs, Sequence) and outputs:
        return outputs[0], [value for value in outputs[1:] if isinstance(value, Tensor)]
    raise TypeError(f"the network must give a tensor of logits, or several, got {type(outputs).__name__}")
