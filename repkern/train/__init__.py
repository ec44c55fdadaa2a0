"""Training: one engine for every way of training, its recipes, checkpoints and schedules."""

from repkern.train.callbacks import Callback, StructureChanged
from repkern.train.checkpoint import CheckpointError, CheckpointFolder, DamagedCheckpointError
from repkern.train.distributed import DistributedError, Runtime
from repkern.train.recipe import Recipe, TrainingRecipe
from repkern.train.task import Classification, Result, Task
from repkern.train.trainer import Interrupted, Trainer, TrainingDivergedError

__all__ = [
    "Callback",
    "CheckpointError",
    "CheckpointFolder",
    "Classification",
    "DamagedCheckpointError",
    "DistributedError",
    "Interrupted",
    "Recipe",
    "Result",
    "Runtime",
    "StructureChanged",
    "Task",
    "Trainer",
    "TrainingDivergedError",
    "TrainingRecipe",
]
