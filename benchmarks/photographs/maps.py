"""How good each map is as a mask, held against the object that was pasted; and training with that object's mask."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskcf_fast.data import Loader, LoaderConfig, build_loader, scan_images
from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.methods.label_map import LabelMap
from maskcf_fast.methods.losses import StepOutput
from maskcf_fast.methods.method import Method
from maskcf_fast.methods.registry import register
from maskcf_fast.models import ImageClassifier
from maskcf_fast.ops import select_patches

from .data import mask_of

THRESHOLD = 0.3  # of object-single
MAPS: dict[str, tuple[str, str, int]] = {  # kind, target and first layer
    "relevance of the logit": ("relevance", "logit", 0),
    "of the log-probability": ("relevance", "logprob", 0),
    "of the logit, last 4 layers": ("relevance", "logit", -4),
    "of the logit, last layer": ("relevance", "logit", -1),
    "Grad-CAM": ("gradcam", "logit", 0),
}
COVERED = 0.5  # share of a patch from which it is of the object

true_masks: dict[bytes, Tensor] = {}  # the method below is given pixels and nothing else: digest of an image → [L]


class TrueObject(CounterfactualDistiller):
    """The step with the object's own mask in place of a map's, found by the image's pixels in `true_masks`."""

    def losses(self, images: Tensor, labels: Tensor, **options: Any) -> StepOutput:
        """As `CounterfactualDistiller.losses`."""
        return super().losses(images, labels, **{**options, "mask": look_up(images)})

    def backward(self, images: Tensor, labels: Tensor, **options: Any) -> StepOutput:
        """As `CounterfactualDistiller.backward`."""
        return super().backward(images, labels, **{**options, "mask": look_up(images)})


@register("true-object", "strategy", "weight", "ema_teacher")
def _(student: ImageClassifier, **settings: Any) -> Method:
    """Feature distillation on images whose pasted object is masked."""
    return TrueObject(student, copy.deepcopy(student.backbone), **settings)


def look_up(images: Tensor) -> Tensor:
    """The masks ``[N, L]`` of uint8 images ``[N, S, S, 3]``."""
    return torch.stack([true_masks[digest(image)] for image in images])


def digest(image: Tensor) -> bytes:
    """Of an image's pixels."""
    return hashlib.sha256(image.cpu().numpy().tobytes()).digest()


def remember(root: Path, folder: str, image_size: int, patch_size: int) -> Loader:
    """Put the masks of a folder of images into `true_masks`; the loader that gave their pixels."""
    manifest = scan_images(root / folder)
    loader = build_loader(manifest, LoaderConfig(32, image_size, train=False, threads=1))
    for batch in loader:
        for image, i in zip(batch.images, batch.indices, strict=True):
            path = Path(manifest.paths[int(i)])
            label = manifest.classes[manifest.labels[int(i)]]
            true_masks[digest(image)] = patches(
                mask_of(root, f"{folder}/{label}/{path.name}"), image_size // patch_size
            )
    return loader


def patches(path: Path, grid: int) -> Tensor:
    """Which patches of a mask's picture are at least half covered, ``[grid²]`` bool."""
    with Image.open(path) as picture:
        alpha = np.asarray(picture.resize((grid, grid), Image.Resampling.BOX), dtype=np.float32) / 255
    return torch.from_numpy(alpha >= COVERED).flatten()


def overlap(model: ImageClassifier, loader: Loader, most: int) -> dict[str, dict[str, float]]:
    """Of every map, cut at the paper's threshold: its share of the image, how much of the object it covers, how much
    of it is object, and intersection over union; in per cent, means over the first ``most`` images of each class."""
    found: dict[str, list[Tensor]] = {name: [] for name in MAPS}
    taken: dict[int, int] = {}
    for batch in loader:
        chosen = [i for i, k in enumerate(batch.labels.tolist()) if taken.setdefault(k, 0) < most and _count(taken, k)]
        if not chosen:
            continue
        images, labels = batch.images[chosen], batch.labels[chosen]
        truth = look_up(images)
        feature, taps = model.backbone.encode(model.backbone.embed(images), record=True)
        logits = model.head(feature)
        for name, (kind, target, start) in MAPS.items():
            cam = LabelMap(kind, target, start, model.backbone.config)(logits, labels, taps)
            found[name].append(figures(select_patches(cam.detach(), threshold=THRESHOLD), truth))
    names = ("masked", "of the object", "is object", "IoU")
    means: Mapping[str, Tensor] = {name: 100 * torch.cat(rows).nanmean(dim=0) for name, rows in found.items()}
    return {name: dict(zip(names, row.tolist(), strict=True)) for name, row in means.items()}


def figures(mask: Tensor, truth: Tensor) -> Tensor:
    """Per image ``[N, 4]``: share masked, share of the object masked, share of the mask that is object, IoU; NaN where
    there is nothing to take a share of."""
    both, either = (mask & truth).sum(dim=1), (mask | truth).sum(dim=1)
    return torch.stack(
        [mask.float().mean(dim=1), both / truth.sum(dim=1), both / mask.sum(dim=1), both / either], dim=1
    )


def _count(taken: dict[int, int], label: int) -> bool:
    taken[label] += 1
    return True
