"""Fine-tuning methods: each maps a batch to its losses. The counterfactual one is in `counterfactual`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.precision import autocast
from ..models import ImageClassifier, VisionTransformer


class StepOutput(NamedTuple):
    """Losses of a batch, and what they were computed from."""

    loss: Tensor  # scalar, to call backward on
    task: Tensor  # scalar, cross-entropy on the clean images, detached
    distill: Tensor  # scalar, distillation loss before its weight, detached
    logits: Tensor  # [N, classes] of the clean images, detached
    cam: Tensor | None = None  # [N, L] relevance
    mask: Tensor | None = None  # [N, L] bool


class Method(nn.Module):
    """A student, perhaps a frozen teacher, and the losses of one batch.

    Subclasses give ``losses(images, labels, *, generator=None) -> StepOutput``, with images as
    `VisionTransformer.embed` takes them, labels int64 ``[N]``, and ``generator`` on the images' device.

    Attributes:
        precision: "fp32", or "bf16": bfloat16 with float32 weights, losses and statistics.
        ema_decay: Where positive, `update_teacher` moves the teacher after the student; 0 leaves it frozen.
    """

    precision = "fp32"
    ema_decay = 0.0

    def __init__(self, student: ImageClassifier, teacher: nn.Module | None = None, weight: float = 0.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise UserError(f"weight must not be negative, got {weight}")
        self.student = student
        self.teacher = teacher
        self.weight = weight
        if teacher is not None:
            if any(p is q for p in student.parameters() for q in teacher.parameters()):
                raise UserError("student and teacher share parameters: give the teacher a copy (copy.deepcopy)")
            teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Method:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self) -> None:
        """``teacher ← ema_decay * teacher + (1 - ema_decay) * student``, after an optimiser step.

        Source: Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017.
        """
        if self.ema_decay and self.teacher is not None:
            source = self.student if isinstance(self.teacher, ImageClassifier) else self.student.backbone
            torch._foreach_lerp_(list(self.teacher.parameters()), list(source.parameters()), 1 - self.ema_decay)

    def losses(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> StepOutput:
        """The batch's losses, at the precision of the caller."""
        raise NotImplementedError

    def forward(self, images: Tensor, labels: Tensor, **options: Any) -> StepOutput:
        """Losses of a batch, at the method's precision; ``loss.backward()`` gives every parameter's gradient.

        Args:
            images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1].
            labels: int64 ``[N]``.
            options: ``generator=``, on the images' device, where the method draws anything; further ones as
                the method has them.
        """
        with autocast(images.device, self.precision):
            return self.losses(images, labels, **options)

    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
    ) -> StepOutput:
        """``(scale * forward(...).loss).backward()``: adds to every parameter's ``grad``.

        Args:
            images: As `forward` takes them.
            labels: int64 ``[N]``.
            generator: As `forward` takes it.
            scale: Factor of the gradient.

        Returns:
            The losses, detached.
        """
        out: StepOutput = self(images, labels, generator=generator)
        (scale * out.loss).backward()
        return out._replace(loss=out.loss.detach())


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


class FineTuning(Method):
    """Cross-entropy alone (FT). With ``probe=True`` only the head learns (LP)."""

    def __init__(self, student: ImageClassifier, *, probe: bool = False) -> None:
        super().__init__(student)
        self.probe = probe
        if probe:
            student.backbone.requires_grad_(False)

    def losses(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> StepOutput:
        """Losses of a batch."""
        logits = self.student(images)
        return step_output(task_loss(logits, labels), logits)


class FeatureDistillation(Method):
    """Cross-entropy, and the student's features pulled to the teacher's on the clean images (FD)."""

    def __init__(self, student: ImageClassifier, teacher: VisionTransformer, weight: float = 30.0) -> None:
        super().__init__(student, teacher, weight)

    def losses(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> StepOutput:
        """Losses of a batch; the clean forward is shared by both."""
        assert self.teacher is not None
        feature = self.student.features(images)
        logits = self.student.head(feature)
        with torch.no_grad():
            target = self.teacher(images)
        return step_output(task_loss(logits, labels), logits, feature_loss(feature, target), self.weight)


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
