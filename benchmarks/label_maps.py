"""How far other maps agree with the paper's: ``python -m benchmarks.label_maps --weights FILE --images DIR``.

For every map that a mask can be cut from: the arithmetic of a step, and on the images, the rank correlation with the
relevance of the label's logit, and the overlap (intersection over union) of the masks at the paper's threshold.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.core.command import command
from maskcf_fast.data import LoaderConfig, build_loader, scan_images
from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.methods.label_map import LabelMap
from maskcf_fast.models import ImageClassifier
from maskcf_fast.ops import select_patches
from maskcf_fast.training.build import build_model
from maskcf_fast.training.cost import complete_flop_counter, forward_flops
from maskcf_fast.training.settings import ModelConfig

from .tables import options, table

MAPS: dict[str, dict[str, Any]] = {
    "relevance of the logit": {},
    "relevance of the log-probability": {"cam_target": "logprob"},
    "relevance, last layer": {"start_layer": -1},
    "Grad-CAM of the logit": {"cam": "gradcam"},
    "Grad-CAM of the log-probability": {"cam": "gradcam", "cam_target": "logprob"},
}


def maps_of(model: ImageClassifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Every map of a batch, ``[N, L]``."""
    feature, taps = model.backbone.encode(model.backbone.embed(images), record=True)
    logits, vit = model.head(feature), model.backbone.config
    return {
        name: LabelMap(
            options.get("cam", "relevance"), options.get("cam_target", "logit"), options.get("start_layer", 0), vit
        )(logits, labels, taps)
        for name, options in MAPS.items()
    }


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, per row."""
    ranks = [x.argsort(dim=1).argsort(dim=1).float() for x in (a, b)]
    x, y = (r - r.mean(dim=1, keepdim=True) for r in ranks)
    return (x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1))


def step_flops(model: ImageClassifier, images: Tensor, labels: Tensor, name: str) -> float:
    """Arithmetic of an object-single step with that map, in plain forward passes."""
    method = CounterfactualDistiller(model, copy.deepcopy(model.backbone), "object-single", **MAPS[name])
    with FlopCounterMode(display=False) as counter:
        method.backward(images, labels)
    method.zero_grad()
    return counter.get_total_flops() / (len(images) * forward_flops(model.transformer.config))


@command()
def main(arguments: list[str]) -> None:
    given = options(
        "label_maps", __doc__, arguments,
        arch={"default": "tiny", "help": "preset of the model"},
        weights={"type": Path, "required": True, "help": "a run's model.safetensors"},
        images={"type": Path, "required": True, "help": "images, one folder per class"},
        threshold={"type": float, "default": 0.3, "help": "cut on the normalised map"},
    )  # fmt: skip
    complete_flop_counter()
    manifest = scan_images(given.images)
    model = build_model(ModelConfig(given.arch, given.weights), len(manifest.classes), seed=0)
    loader = build_loader(manifest, LoaderConfig(50, model.backbone.config.image_size, train=False))
    found: dict[str, list[Tensor]] = {name: [] for name in MAPS}  # [3, N]: correlation, overlap, share masked
    for images, labels, _ in loader:
        maps = maps_of(model, images, labels)
        masks = {name: select_patches(cam, threshold=given.threshold) for name, cam in maps.items()}
        exact, exact_mask = next(iter(maps.values())), next(iter(masks.values()))
        for name, mask in masks.items():
            overlap = (mask & exact_mask).sum(dim=1) / (mask | exact_mask).sum(dim=1).clamp(min=1)
            found[name].append(torch.stack([rank_correlation(maps[name], exact), overlap, mask.float().mean(dim=1)]))
    print(f"{len(manifest)} images, {given.arch}, threshold {given.threshold}, torch {torch.__version__}\n")
    rows = []
    for name, figures in found.items():
        flops = step_flops(model, images[:8], labels[:8], name)
        rows.append((name, f"{flops:.2f} F", *(f"{x:.2f}" for x in torch.cat(figures, dim=1).mean(dim=1))))
    print("\n".join(table(("map", "step", "rank correlation", "overlap of masks", "share masked"), rows, left=1)))


if __name__ == "__main__":
    sys.exit(main())
