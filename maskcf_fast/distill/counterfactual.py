"""The counterfactual step, reorganised: the same function as `paper_order`, with less arithmetic.

Per batch, with F one student forward (multiply by images for FLOPs):

    clean forward    1 F    shared by the relevance map and the task loss
    relevance map    1 F    a backward pass for data gradients only, and one row per layer
    masked student   1 F    tokens refilled or dropped after the embedding, which is not repeated
    teacher          1 F    likewise from its own embedding of the clean pixels
    backward         4 F    of the clean and the masked branch
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_tensor, value_checks
from ..models import ImageClassifier, Tap, VisionTransformer
from ..ops import drop_tokens, gather_tokens, relevance_cam
from .methods import Method, StepOutput, feature_loss, step_output, task_loss
from .strategies import Draw, MaskStrategy


class CounterfactualDistiller(Method):
    """Robust fine-tuning on counterfactual images (Xiao et al., CVPR 2023).

    ``loss = CE(student logits on clean images) + weight * mean((f_S - f_T)²)``, the features taken on images
    whose object, context or random patches are refilled from other images of the batch, or dropped.

    Args:
        student: The model to fine-tune.
        teacher: The frozen pre-trained backbone, same patch grid; a copy, not the student's own.
        strategy: A `MaskStrategy`, or its name such as ``"object-single"`` (the paper's settings).
        weight: Weight of the distillation loss.
        start_layer: First layer that counts in the relevance map.

    Raises:
        ValueError: Unknown strategy (the nearest is suggested), a teacher with another patch grid or feature
            size, shared parameters, a negative weight, or a ``start_layer`` outside the model.
    """

    def __init__(
        self,
        student: ImageClassifier,
        teacher: VisionTransformer,
        strategy: MaskStrategy | str,
        weight: float = 30.0,
        *,
        start_layer: int = 0,
    ) -> None:
        super().__init__(student, teacher, weight)
        ours, theirs = student.backbone.config, teacher.config
        for field in ("num_patches", "feature_dim"):
            if getattr(ours, field) != getattr(theirs, field):
                raise ValueError(
                    f"student and teacher differ in {field}: {getattr(ours, field)} and {getattr(theirs, field)}"
                )
        depth = ours.depth
        if not -depth <= start_layer < depth:
            raise ValueError(f"start_layer must lie in [{-depth}, {depth - 1}], got {start_layer}")
        self.strategy = MaskStrategy.from_name(strategy) if isinstance(strategy, str) else strategy
        self.start_layer = start_layer

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
    ) -> StepOutput:
        """Losses of a batch.

        Args:
            images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1].
            labels: int64 ``[N]``.
            generator: Source of the donors and random masks, on the images' device.
            draw: Randomness drawn beforehand (`MaskStrategy.draw`), instead of ``generator``.

        Returns:
            The losses; ``loss.backward()`` gives every parameter's gradient.
        """
        student, teacher, strategy = self.student, self.teacher, self.strategy
        assert isinstance(teacher, VisionTransformer)
        check_tensor("labels", labels, [len(images)], dtypes=[torch.int64], device=images.device)
        classes = len(student.head.bias)
        if value_checks(labels) and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(f"labels must lie between 0 and {classes - 1}, got {labels.min()} to {labels.max()}")
        if draw is None:
            num_patches = student.backbone.config.num_patches
            draw = strategy.draw(len(images), num_patches, generator=generator, device=images.device)

        tokens = student.backbone.embed(images)
        feature, taps = student.backbone.encode(tokens)
        logits = student.head(feature)
        cam = label_relevance(logits, labels, taps, self.start_layer) if strategy.needs_cam else None
        mask = strategy.mask(cam, draw)

        masked = encode_masked(student.backbone, tokens, mask, draw.donors, strategy)
        with torch.no_grad():
            target = encode_masked(teacher, teacher.embed(images), mask, draw.donors, strategy)
        return step_output(
            task_loss(logits, labels), logits, feature_loss(masked, target), self.weight, cam=cam, mask=mask
        )


def label_relevance(logits: Tensor, labels: Tensor, taps: list[Tap], start_layer: int = 0) -> Tensor:
    """Relevance of every patch for the label's logit, ``[N, L]``; the graph of ``logits`` is kept.

    Only the attention outputs are asked for, so no weight gradient is formed.
    """
    if not logits.requires_grad:
        raise RuntimeError("the relevance map needs gradients: call it with torch.enable_grad() and a graph")
    score = logits.gather(1, labels[:, None]).sum()
    used = taps[start_layer:]
    grads = torch.autograd.grad(score, [tap.o for tap in used], retain_graph=True)
    return relevance_cam(used, grads)


def encode_masked(
    backbone: VisionTransformer, tokens: Tensor, mask: Tensor, donors: Tensor | None, strategy: MaskStrategy
) -> Tensor:
    """Feature ``[N, D]`` of the counterfactual images, from the tokens of the clean ones."""
    if donors is not None:
        return backbone.encode(gather_tokens(tokens, mask, donors))[0]
    kept, key_mask = drop_tokens(tokens, mask, dropped=strategy.dropped(mask.shape[1]))
    return backbone.encode(kept, key_mask=key_mask)[0]
