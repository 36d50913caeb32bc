"""Fine-tuning whose logits stay near the pre-trained model's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..models import ImageClassifier
from .losses import StepOutput, check_temperature, logit_loss, step_output, task_loss
from .method import Method
from .registry import register


class KnowledgeDistillation(Method):
    """Cross-entropy, and the student's softened logits pulled to the teacher's on the clean images (KD)."""

    def __init__(
        self,
        student: ImageClassifier,
        teacher: ImageClassifier,
        weight: float = 30.0,
        temperature: float = 10.0,
    ) -> None:
        super().__init__(student, teacher, weight)
        self.temperature = check_temperature(temperature)

    def losses(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> StepOutput:
        """Losses of a batch; the mean of the divergence is over the N images."""
        assert self.teacher is not None
        logits = self.student(images)
        with torch.no_grad():
            target = self.teacher(images)
        return step_output(task_loss(logits, labels), logits, logit_loss(logits, target, self.temperature), self.weight)


@register("kd", "weight", "temperature", "ema_teacher")
def _(student: ImageClassifier, **settings: Any) -> Method:
    """Knowledge distillation on clean images."""
    return KnowledgeDistillation(student, copy.deepcopy(student), **settings)
