"""Fine-tuning that stays near its starting point in weight space."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..models import ImageClassifier
from .losses import StepOutput, step_output, task_loss
from .method import Method
from .registry import register


class L2SP(Method):
    """Cross-entropy, and half the squared distance of all weights from where they started (L2-SP).

    The head counts as well: it starts from the zero-shot head, and is not new.

    Source: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    ICML 2018.
    """

    weight_decay = 0.0  # the penalty takes its place: it would pull to zero

    def __init__(self, student: ImageClassifier, weight: float = 0.1) -> None:
        super().__init__(student, copy.deepcopy(student), weight)

    def narrow_teacher(self) -> None:
        """Leave it as it is: it is not run, but what distances are taken from."""

    def losses(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> StepOutput:
        """Losses of a batch; ``distill`` is the penalty before its weight."""
        assert self.teacher is not None
        logits = self.student(images)
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        penalty = torch.stack([(p - start).square().sum() for p, start in pairs]).sum() / 2
        return step_output(task_loss(logits, labels), logits, penalty, self.weight)


@register("l2-sp", "weight", fsdp=False)
def _(student: ImageClassifier, **settings: Any) -> Method:
    """A penalty on the distance from the initial weights."""
    return L2SP(student, **settings)
