"""Fine-tuning whose features stay near the pre-trained model's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..models import Backbone, ImageClassifier
from .losses import StepOutput, feature_loss, step_output, task_loss
from .method import Method
from .registry import register


class FeatureDistillation(Method):
    """Cross-entropy, and the student's features pulled to the teacher's on the clean images (FD)."""

    def __init__(self, student: ImageClassifier, teacher: Backbone, weight: float = 30.0) -> None:
        super().__init__(student, teacher, weight)

    def losses(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> StepOutput:
        """Losses of a batch; the clean forward is shared by both."""
        assert self.teacher is not None
        feature = self.student.features(images)
        logits = self.student.head(feature)
        with torch.no_grad():
            target = self.teacher(images)
        return step_output(task_loss(logits, labels), logits, feature_loss(feature, target), self.weight)


@register("fd", "weight", "ema_teacher")
def _(student: ImageClassifier, **settings: Any) -> Method:
    """Feature distillation on clean images."""
    return FeatureDistillation(student, copy.deepcopy(student.backbone), **settings)
