"""The trainer: configuration, the loop, evaluation, checkpoints, and processes."""

from .config import TrainConfig
from .trainer import Trainer, TrainingDiverged

__all__ = ["TrainConfig", "Trainer", "TrainingDiverged"]
