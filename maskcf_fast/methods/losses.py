"""The losses that methods are made of, and what a step returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError


class StepOutput(NamedTuple):
    """Losses of a batch, and what they were computed from."""

    loss: Tensor  # scalar, to call backward on
    task: Tensor  # scalar, cross-entropy on the clean images, detached
    distill: Tensor  # scalar, distillation loss before its weight, detached
    logits: Tensor  # [N, classes] of the clean images, detached
    cam: Tensor | None = None  # [N, L] relevance
    mask: Tensor | None = None  # [N, L] bool


def step_output(
    task: Tensor, logits: Tensor, distill: Tensor | None = None, weight: float = 0.0, **extra: Tensor | None
) -> StepOutput:
    """Add the losses up: ``task + weight * distill``."""
    if distill is None:
        return StepOutput(task, task.detach(), torch.zeros_like(task.detach()), logits.detach(), **extra)
    return StepOutput(task + weight * distill, task.detach(), distill.detach(), logits.detach(), **extra)


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32."""
    return F.cross_entropy(logits.float(), labels)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over N×D, in float32."""
    return F.mse_loss(student.float(), teacher.float())


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² KL(teacher ‖ student)`` of the softened logits ``[N, classes]``, mean over the N images, in float32.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    ours, theirs = (F.log_softmax(x.float() / temperature, dim=-1) for x in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def check_temperature(temperature: float) -> float:
    """The temperature, if it is one."""
    if not temperature > 0:
        raise UserError(f"temperature must be positive, got {temperature}")
    return temperature
