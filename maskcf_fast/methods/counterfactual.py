"""The counterfactual step, reorganised: the same function as `paper_order`, with less arithmetic.

Per batch, with F one student forward (multiply by images for FLOPs):

    clean forward    1 F    shared by the relevance map and the task loss
    relevance map    1 F    a backward pass for data gradients only, and one row per layer; none for a given mask
    masked student   1 F    tokens refilled or dropped after the embedding, which is not repeated
    teacher          1 F    likewise from its own embedding of the clean pixels, which are normalised once
    backward         4 F    of the clean and the masked branch
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..core.checks import check_tensor, value_checks
from ..core.errors import UserError
from ..core.precision import autocast, casts_kept
from ..models import Backbone, ImageClassifier, Tap
from .label_map import LabelMap
from .losses import StepOutput, check_temperature, feature_loss, logit_loss, step_output, task_loss
from .method import Method
from .registry import register
from .strategies import Draw, MaskStrategy


class CounterfactualDistiller(Method):
    """Robust fine-tuning on counterfactual images (Xiao et al., CVPR 2023).

    ``loss = CE(student logits on clean images) + weight * mean((f_S - f_T)²)``, the features taken on images
    whose object, context or random patches are refilled from other images of the batch, or dropped.

    Args:
        student: The model to fine-tune.
        teacher: The frozen pre-trained backbone, same patch grid; a copy, not the student's own. With its head (an
            `ImageClassifier`) where ``temperature`` or ``cam_source="teacher"`` asks for its logits.
        strategy: A `MaskStrategy`, or its name such as ``"object-single"`` (the paper's settings).
        weight: Weight of the distillation loss.
        cam: ``"relevance"``, or ``"gradcam"`` on the last block (see `LabelMap`).
        cam_target: What the map explains: the label's ``"logit"``, as the paper, or its ``"logprob"``, which sets
            the label against its rivals; `backward` then takes the map's gradients from the task loss's own pass.
        start_layer: First layer that counts in the relevance.
        cam_source: Whose map: the ``"student"``'s, as the paper, or the ``"teacher"``'s, which does not follow what
            fine-tuning learns and costs a further clean forward.
        temperature: Where given, softened logits are compared instead of features (KD on counterfactuals).

    Raises:
        ValueError: Unknown strategy (the nearest is suggested), map or target, a teacher with another patch grid
            or feature size, shared parameters, a negative weight, a ``start_layer`` outside the
            model, or no patch left.
    """

    def __init__(
        self,
        student: ImageClassifier,
        teacher: Backbone | ImageClassifier,
        strategy: MaskStrategy | str,
        weight: float = 30.0,
        *,
        cam: str = "relevance",
        cam_target: str = "logit",
        start_layer: int = 0,
        cam_source: str = "student",
        temperature: float | None = None,
    ) -> None:
        super().__init__(student, teacher, weight)
        if cam_source not in ("student", "teacher"):
            raise UserError(f'cam_source must be "student" or "teacher", got {cam_source!r}')
        if (temperature is not None or cam_source == "teacher") and not isinstance(teacher, ImageClassifier):
            raise UserError("the teacher's logits are asked for: give it a head (an ImageClassifier)")
        self.cam_source = cam_source
        self.temperature = None if temperature is None else check_temperature(temperature)
        ours, theirs = student.backbone.config, self._teacher_backbone.config
        for field in ("num_patches", "feature_dim"):
            if getattr(ours, field) != getattr(theirs, field):
                raise UserError(
                    f"student and teacher differ in {field}: {getattr(ours, field)} and {getattr(theirs, field)}"
                )
        self.strategy = MaskStrategy.from_name(strategy) if isinstance(strategy, str) else strategy
        if self.strategy.filling.leaves_out and self.strategy.masked(ours.num_patches) == ours.num_patches:
            raise UserError(
                f"{self.strategy.name} with rate={self.strategy.rate}, top_k={self.strategy.top_k} leaves none of the "
                f"{ours.num_patches} patches, and features of nothing: mask fewer"
            )
        self.same_rows = all(
            getattr(ours, field) == getattr(theirs, field) for field in ("image_size", "patch_size", "mean", "std")
        )
        self.map = LabelMap(cam, cam_target, start_layer, theirs if cam_source == "teacher" else ours)

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
        mask: Tensor | None = None,
    ) -> StepOutput:
        """Losses of a batch, as one graph.

        Args:
            images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1].
            labels: int64 ``[N]``.
            generator: Source of the donors and random masks, on the images' device.
            draw: Randomness drawn beforehand (`MaskStrategy.draw`), instead of ``generator``.
            mask: bool ``[N, L]``: what to mask, such as `select` gave before. No map is then made, and 1 F less.
        """
        draw = draw or self._draw(images, generator)
        tokens, embed_teacher = self._embed(images)
        logits, taps = self._clean(tokens, labels, mask)
        cam = None
        if mask is None:
            cam = self.map(logits, labels, taps) if taps else self._teacher_cam(embed_teacher, labels)
            mask = self.strategy.mask(cam, draw)
        distill = self._distill(tokens, embed_teacher, mask, draw)
        return step_output(task_loss(logits, labels), logits, distill, self.weight, cam=cam, mask=mask)

    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
        draw: Draw | None = None,
        mask: Tensor | None = None,
    ) -> StepOutput:
        """As `Method.backward`, in two passes: of the task loss as soon as the map is taken, then of the distillation.

        The clean branch's activations are gone before the masked branch makes its own, so that a step takes half
        the memory. The gradients are the same sums.
        """
        draw = draw or self._draw(images, generator)
        with casts_kept(images.device, self.precision) if self.keep_casts else nullcontext():
            return self._passes(images, labels, scale, draw, mask)

    def _passes(self, images: Tensor, labels: Tensor, scale: float, draw: Draw, mask: Tensor | None) -> StepOutput:
        """Those of `backward`, which run the same weights."""
        with autocast(images.device, self.precision):
            tokens, embed_teacher = self._embed(images)
            shared = tokens.detach().requires_grad_(tokens.requires_grad)  # where the two branches meet
            logits, taps = self._clean(shared, labels, mask)
            task = task_loss(logits, labels)
            out = step_output(task, logits)
        cam = None
        if taps and self.map.target == "logprob":  # the task loss is minus the mean of what the map explains
            for activation in self.map.read(taps):
                activation.retain_grad()
            (scale * task).backward()
            read = [cast(Tensor, x.grad) * (-len(images) / scale) for x in self.map.read(taps)]
            cam = self.map.from_gradients(taps, read)
            del read
        else:
            if taps:
                cam = self.map(logits, labels, taps)
            elif mask is None:
                with autocast(images.device, self.precision):
                    cam = self._teacher_cam(embed_teacher, labels)
            (scale * task).backward()
        del logits, taps, task
        chosen = self.strategy.mask(cam, draw) if mask is None else mask

        with autocast(images.device, self.precision):
            distill = self._distill(tokens, embed_teacher, chosen, draw)
        loss = scale * self.weight * distill
        if tokens.requires_grad:  # the clean branch's gradient joins where the branches meet
            torch.autograd.backward([loss, tokens], [torch.ones_like(loss), cast(Tensor, shared.grad)])
        elif loss.requires_grad:  # not where only the head is trained, of which features know nothing
            loss.backward()
        distill = distill.detach()
        return out._replace(loss=out.task + self.weight * distill, distill=distill, cam=cam, mask=chosen)

    def select(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mask ``[N, L]`` bool that `backward` would now cut from the map; touches no parameter's gradient.

        Args:
            images: As `losses` takes them.
            labels: int64 ``[N]``.

        Raises:
            ValueError: The strategy masks at random.
        """
        with autocast(images.device, self.precision):
            tokens, embed_teacher = self._embed(images)
            logits, taps = self._clean(tokens, labels)
            cam = None if taps else self._teacher_cam(embed_teacher, labels)
        if taps:
            cam = self.map(logits, labels, taps)
        return self.strategy.mask(cam, Draw(None, None))

    def _draw(self, images: Tensor, generator: torch.Generator | None) -> Draw:
        num_patches = self.student.backbone.config.num_patches
        return self.strategy.draw(len(images), num_patches, generator=generator, device=images.device)

    def _clean(self, tokens: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tap]]:
        """Logits of the clean images, and the taps if a map of them is to be taken: not where a mask is given."""
        check_tensor("labels", labels, [len(tokens)], dtypes=[torch.int64], device=tokens.device)
        classes = len(self.student.head.bias)
        if value_checks(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise UserError(f"labels must lie between 0 and {classes - 1}, got {labels.min()} to {labels.max()}")
        if mask is not None:
            shape = [len(tokens), self.student.backbone.config.num_patches]
            check_tensor("mask", mask, shape, dtypes=[torch.bool], device=tokens.device)
        feature, taps = self.student.backbone.encode(
            tokens, record=mask is None and self.strategy.needs_cam and self.cam_source == "student"
        )
        return self.student.head(feature), taps

    def _distill(self, tokens: Tensor, embed_teacher: Callable[[], Tensor], mask: Tensor, draw: Draw) -> Tensor:
        """The distillation loss on the counterfactual images, which are made of the clean ones' tokens."""
        teacher = self._teacher_backbone
        with torch.no_grad():
            target = self.strategy.encode(teacher, embed_teacher(), mask, draw)
        masked = self.strategy.encode(self.student.backbone, tokens, mask, draw)
        if self.temperature is None:
            return feature_loss(masked, target)
        with torch.no_grad():
            wanted = cast(ImageClassifier, self.teacher).head(target)
        return logit_loss(self.student.head(masked), wanted, self.temperature)

    @property
    def _teacher_backbone(self) -> Backbone:
        teacher = self.teacher
        return teacher.backbone if isinstance(teacher, ImageClassifier) else cast(Backbone, teacher)

    def _embed(self, images: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """The student's tokens, and what makes the teacher's: of the same rows, unless it normalises otherwise."""
        student, teacher = self.student.backbone, self._teacher_backbone
        rows = student.rows(images)
        theirs = partial(teacher.embed_rows, rows) if self.same_rows else partial(teacher.embed, images)
        return student.embed_rows(rows), theirs

    def _teacher_cam(self, embed_teacher: Callable[[], Tensor], labels: Tensor) -> Tensor | None:
        """The teacher's map of the clean images, where it is the one that masks are cut from."""
        if not self.strategy.needs_cam or self.cam_source == "student":
            return None
        # Its weights are frozen: without this there would be no graph to take gradients from.
        tokens = embed_teacher().detach().requires_grad_()
        feature, taps = self._teacher_backbone.encode(tokens, record=True)
        return self.map(cast(ImageClassifier, self.teacher).head(feature), labels, taps)


MAP = ("cam", "cam_target", "start_layer", "cam_source")


@register("counterfactual", "strategy", "weight", "ema_teacher", *MAP)
def _(student: ImageClassifier, **settings: Any) -> Method:
    """Feature distillation on counterfactual images, the paper's method."""
    teacher = student if settings.get("cam_source") == "teacher" else student.backbone
    return CounterfactualDistiller(student, copy.deepcopy(teacher), **settings)


@register("cf-kd", "strategy", "weight", "temperature", "ema_teacher", *MAP)
def _(student: ImageClassifier, **settings: Any) -> Method:
    """Knowledge distillation on counterfactual images."""
    return CounterfactualDistiller(student, copy.deepcopy(student), **settings)
