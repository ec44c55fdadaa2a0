"""What a training run does, as sections that can be checked, written and read back: the schema of recipes/*.yaml."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from repkern.data.recipe import DataRecipe
from repkern.data.section import Section

__all__ = [
    "CheckpointRecipe",
    "EMARecipe",
    "LogRecipe",
    "LossRecipe",
    "ModelRecipe",
    "OptimizerRecipe",
    "PaperRow",
    "Recipe",
    "ReplaceRecipe",
    "RunRecipe",
    "ScheduleRecipe",
    "TrainingRecipe",
]


class ReplaceRecipe(Section):
    """`repkern.replace_convs` on the finished network."""

    block: str = Field("OREPAConv2d", description="a class of repkern.nn that takes the arguments of nn.Conv2d")
    preserve: bool = Field(False, description="start as exactly the network there was")
    where: tuple[str, ...] = Field((), description="names of convolutions, with wildcards; empty for all")
    options: dict[str, Any] = Field({}, description="further arguments of the block, such as scaling")


class ModelRecipe(Section):
    """Which network. Its classes and input channels come from the data."""

    name: str = Field("digits_net", description="a name of `repkern models`, digits_net or small_vgg")
    block: str | None = Field(None, description="kind of its blocks; none for the published one")
    options: dict[str, Any] = Field({}, description="further arguments of create_model")
    checkpoint: str = Field("", description="weights to start from; a last layer of other classes is left out")
    replace: ReplaceRecipe | None = Field(None, description="convolutions to replace by blocks")
    freeze: tuple[str, ...] = Field((), description="names of parameters that are not trained, with wildcards")
    sync_norm: bool = Field(False, description="norms share their statistics over all processes")
    dtype: Literal["float32", "float64"] = "float32"


class OptimizerRecipe(Section):
    """Which optimizer. Which parameters decay is the rule of `repkern.optim.weight_decay_groups`."""

    name: Literal["sgd", "adamw", "rmsprop", "repsgd", "repadamw"] = "sgd"
    lr: float = Field(0.1, gt=0, description="peak learning rate, for the whole batch")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    decay_scales: bool = Field(False, description="decay the scales of OREPA's branches, as its released training does")
    decay_all: bool = Field(False, description="decay every parameter, norms and biases too")
    scales: str = Field("", description="repsgd, repadamw: a file of `repkern search hyper`")
    initialize: Literal["scales", "trained_identity", "none"] = Field(
        "scales", description="repsgd, repadamw: what kernels start from; see `repkern.optim.from_scales`"
    )
    multiply: bool = Field(True, description="repsgd, repadamw: multiply gradients by the scales")
    constants: Literal["searched", "ones", "initial", "averaged"] = Field(
        "searched", description="repsgd, repadamw: what the scales are replaced by, for comparisons"
    )
    layer_lr: dict[str, float] = Field({}, description="factor on the learning rate by name of parameter, wildcards")


class ScheduleRecipe(Section):
    """The learning rate over the steps: a linear warm-up, then `name` down to `final` times the peak."""

    name: Literal["cosine", "poly", "linear", "step", "constant", "onecycle"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)
    warmup_start: float = Field(0.01, ge=0, le=1, description="first factor on the learning rate")
    final: float = Field(0.0, ge=0, le=1, description="last factor on the learning rate")
    power: float = Field(0.9, gt=0, description="poly: exponent")
    milestones: tuple[float, ...] = Field((), description="step: epochs after which the rate falls")
    gamma: float = Field(0.1, gt=0, description="step: factor at each milestone")


class LossRecipe(Section):
    """What is minimized."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    custom_l2: bool = Field(False, description="decay the equivalent kernels of RepVGG's blocks, not each branch's")
    auxiliary: float = Field(0.0, ge=0, description="weight of further heads, for networks that have them")


class EMARecipe(Section):
    """An exponential moving average of the weights, which is what is tested and saved as best."""

    decay: float = Field(0.999, gt=0, lt=1)
    every: int = Field(1, ge=1, description="steps between updates")
    warmup: bool = Field(True, description="a smaller decay in the first steps: (1 + t) / (10 + t)")


class CheckpointRecipe(Section):
    """When a run is saved, and what is kept. It is saved at the end of every epoch too, and when it is interrupted."""

    every_steps: int = Field(0, ge=0, description="0: not by steps")
    every_minutes: float = Field(10.0, ge=0, description="0: not by time")
    every_epochs: int = Field(1, ge=1, description="epochs between those at the end of an epoch")
    keep: int = Field(2, ge=1, description="newest ones to keep")
    keep_every: int = Field(0, ge=0, description="also keep that of every n-th epoch; 0 for none")
    best: bool = Field(True, description="also keep the one with the best test metric")


class LogRecipe(Section):
    """Where metrics go besides metrics.jsonl and metrics.csv."""

    tensorboard: bool = Field(False, description="event files in the run folder, for TensorBoard")
    trackio: str = Field("", description="a project of trackio")


class RunRecipe(Section):
    """How long, on what, and with which arithmetic."""

    epochs: int = Field(20, ge=1)
    max_steps: int = Field(0, ge=0, description="end after so many steps; 0 for all of the epochs")
    batch_size: int = Field(64, ge=1, description="images of one step, over all processes")
    accumulate: int = Field(1, ge=1, description="pieces that a process computes its part of a batch in")
    seed: int = Field(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0, description="CPU threads; results repeat for the same number; 0 for all cores")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the forward pass, by autocast")
    channels_last: bool = False
    compile: bool = Field(False, description="torch.compile")
    deterministic: bool = Field(True, description="only operations that give the same bits again")
    strategy: Literal["ddp", "fsdp2"] = Field("ddp", description="with several processes")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of the gradient; 0 for any")
    clip_value: float = Field(0.0, ge=0, description="largest element of the gradient; 0 for any")
    max_bad_steps: int = Field(10, ge=1, description="steps in a row with a loss that is not finite before it ends")
    frozen_norms: bool = Field(False, description="norms keep the statistics they have")
    eval_every: int = Field(1, ge=1, description="epochs between tests; the last is always tested")


class TrainingRecipe(Section):
    """All of a recipe but the network and the data: what `Trainer` takes."""

    train: RunRecipe = RunRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    loss: LossRecipe = LossRecipe()
    ema: EMARecipe | None = None
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    log: LogRecipe = LogRecipe()


class PaperRow(Section):
    """Where a recipe comes from, and what was reached there."""

    source: str = Field(description="paper and table: RepVGG (2101.03697), table 4")
    top1: float | None = Field(None, ge=0, le=100, description="accuracy in percent, as printed")
    note: str = ""


class Recipe(TrainingRecipe):
    """A whole recipe: what `repkern train` runs."""

    version: Literal[1] = 1
    name: str = ""
    about: str = ""
    paper: PaperRow | None = None
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if self.optimizer.name in ("repsgd", "repadamw") and not self.optimizer.scales:
            raise ValueError(f"optimizer.name {self.optimizer.name} needs optimizer.scales, a file of scales")
        return self

    def to_json(self) -> str:
        """The whole recipe, defaults included, as JSON text."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
