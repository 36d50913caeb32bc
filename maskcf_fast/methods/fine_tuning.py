"""Fine-tuning on the task alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import ImageClassifier
from .losses import StepOutput, step_output, task_loss
from .method import Method
from .registry import register


class FineTuning(Method):
    """Cross-entropy alone (FT). With ``probe=True`` only the head learns (LP)."""

    def __init__(self, student: ImageClassifier, *, probe: bool = False) -> None:
        super().__init__(student)
        self.probe = probe
        if probe:
            student.backbone.requires_grad_(False)
            self.weight_decay = 0.0  # as in the paper's code

    def losses(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> StepOutput:
        """Losses of a batch."""
        logits = self.student(images)
        return step_output(task_loss(logits, labels), logits)


@register("ft")
def _(student: ImageClassifier) -> Method:
    """Fine-tuning."""
    return FineTuning(student)


@register("lp")
def _(student: ImageClassifier) -> Method:
    """Linear probe: only the head learns."""
    return FineTuning(student, probe=True)
