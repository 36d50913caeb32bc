"""What all fine-tuning methods have in common: each maps a batch to its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.precision import autocast
from ..models import ImageClassifier, VisionTransformer
from .losses import StepOutput


class Method(nn.Module):
    """A student, perhaps a frozen teacher, and the losses of one batch.

    Subclasses give ``losses(images, labels, *, generator=None) -> StepOutput``, with images as
    `VisionTransformer.embed` takes them, labels int64 ``[N]``, and ``generator`` on the images' device.

    Attributes:
        precision: "fp32" ("tf32" is the same here), or "bf16": bfloat16 with float32 weights, losses and statistics.
        keep_casts: Whether the weights' casts to bfloat16 last through a step of several passes. Not where FSDP frees
            the weights between them.
        average: Where given, the running average of the student's weights, which is evaluated in its place.
        weight_decay: The optimiser's, unless another is asked for.
    """

    precision = "fp32"
    keep_casts = True
    weight_decay = 0.1

    def __init__(self, student: ImageClassifier, teacher: nn.Module | None = None, weight: float = 0.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise UserError(f"weight must not be negative, got {weight}")
        self.student = student
        self.teacher = teacher
        self.average: ImageClassifier | None = None
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

    def narrow_teacher(self) -> None:
        """Keep the frozen teacher's weights in bfloat16 where their products are computed in it: the same function.

        For a teacher of this package, that nothing trains and no average follows; it then runs under autocast alone, as
        `forward` and `backward` run it.
        """
        for module in () if self.teacher is None else self.teacher.modules():
            if isinstance(module, VisionTransformer):
                weights = [linear.weight for linear in module.modules() if isinstance(linear, nn.Linear)]
                for weight in (module.patch_weight, *weights):
                    weight.data = weight.data.to(torch.bfloat16)

    @property
    def result(self) -> ImageClassifier:
        """The model that training is for: the student, or its running average."""
        return self.student if self.average is None else self.average

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
