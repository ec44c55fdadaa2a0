"""Training: one engine, its data, settings, checkpoints and schedules."""

from repkern.train.checkpoint import CheckpointError, CheckpointFolder
from repkern.train.config import TrainConfig
from repkern.train.engine import Callback, Interrupted, Trainer, TrainingDivergedError

__all__ = [
    "Callback",
    "CheckpointError",
    "CheckpointFolder",
    "Interrupted",
    "TrainConfig",
    "Trainer",
    "TrainingDivergedError",
]
