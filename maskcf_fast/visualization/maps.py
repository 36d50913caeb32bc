"""What is shown of an image: the student's map of it, and the counterfactual images made by a strategy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.precision import autocast
from ..methods import Draw, MaskStrategy
from ..methods.label_map import LabelMap
from ..models import ImageClassifier
from .plots import kept_patches


def explain_labels(
    student: ImageClassifier, label_map: LabelMap, images: Tensor, labels: Tensor, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Relevance of the patches for each image's label; no parameter's gradient is touched.

    Args:
        student: The model, on the images' device.
        label_map: Which map.
        images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1].
        labels: int64 ``[N]``; a negative one stands for the predicted class.
        precision: "fp32" or "bf16".

    Returns:
        The map ``[N, L]`` and the probabilities ``[N, classes]``, float32.
    """
    was_training = student.training
    student.eval()
    with torch.enable_grad(), autocast(images.device, precision):
        # A leaf of its own: the map needs the activations' gradients even where all parameters are frozen.
        tokens = student.backbone.embed(images).detach().requires_grad_()
        feature, taps = student.backbone.encode(tokens, record=True)
        logits = student.head(feature)
        cam = label_map(logits, torch.where(labels < 0, logits.argmax(dim=1), labels), taps)
    student.train(was_training)
    return cam.detach().float(), logits.detach().float().softmax(dim=1)


def counterfactuals(strategy: MaskStrategy, images: Tensor, cam: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """The masks and the images that they make.

    Args:
        strategy: Which patches, and what fills them.
        images: uint8 ``[N, S, S, 3]``, on the CPU as all tensors here.
        cam: ``[N, L]``.
        draw: Donors, and the mask of a random strategy.

    Returns:
        The mask ``[N, L]`` bool, and images like ``images``; what a strategy leaves out is light grey in them.
    """
    mask = strategy.mask(cam, draw)
    if strategy.filling.leaves_out:
        return mask, torch.from_numpy(kept_patches(images.numpy(), mask.numpy()))
    return mask, strategy.filling.pixels(images.permute(0, 3, 1, 2), mask, draw.donors).permute(0, 2, 3, 1)
