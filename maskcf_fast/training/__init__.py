"""The trainer: configuration, the loop, evaluation, checkpoints, and processes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core.optional import need

if TYPE_CHECKING:
    from .settings import TrainConfig
    from .trainer import Trainer, TrainingDiverged

__all__ = ["TrainConfig", "Trainer", "TrainingDiverged"]


def __getattr__(name: str) -> Any:
    """Import at the first use: `speed` serves without the trainer, and so without what the trainer needs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need("PIL", "tqdm", "yaml")
    return getattr(import_module(".settings" if name == "TrainConfig" else ".trainer", __name__), name)
