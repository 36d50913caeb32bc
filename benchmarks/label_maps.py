"""How far other maps agree with the paper's: ``python -m benchmarks.label_maps --weights FILE --images DIR``.

For every map that a mask can be cut from: the arithmetic of a step, and on the images, the rank correlation with the
relevance of the label's logit, and the overlap (intersection over union) of the masks at the paper's threshold.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.data import LoaderConfig, build_loader, scan_images
from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.methods.label_map import LabelMap
from maskcf_fast.models import ImageClassifier
from maskcf_fast.ops import select_patches
from maskcf_fast.training.build import build_model
from maskcf_fast.training.settings import ModelConfig

from .flops import complete_flop_counter, forward_flops
from .tables import table

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
    return counter.get_total_flops() / (len(images) * forward_flops(model.backbone.config))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="tiny", help="preset of the model")
    parser.add_argument("--weights", type=Path, required=True, help="a run's model.safetensors")
    parser.add_argument("--images", type=Path, required=True, help="images, one folder per class")
    parser.add_argument("--threshold", type=float, default=0.3, help="cut on the normalised map")
    options = parser.parse_args()
    complete_flop_counter()
    manifest = scan_images(options.images)
    model = build_model(ModelConfig(options.arch, options.weights), len(manifest.classes), seed=0)
    loader = build_loader(manifest, LoaderConfig(50, model.backbone.config.image_size, train=False))
    correlation: dict[str, list[Tensor]] = {name: [] for name in MAPS}
    overlap: dict[str, list[Tensor]] = {name: [] for name in MAPS}
    share: dict[str, list[Tensor]] = {name: [] for name in MAPS}
    for images, labels, _ in loader:
        found = maps_of(model, images, labels)
        exact = next(iter(found.values()))
        exact_mask = select_patches(exact, threshold=options.threshold)
        for name, cam in found.items():
            mask = select_patches(cam, threshold=options.threshold)
            either = (mask | exact_mask).sum(dim=1)
            correlation[name].append(rank_correlation(cam, exact))
            overlap[name].append((mask & exact_mask).sum(dim=1) / either.clamp(min=1))
            share[name].append(mask.float().mean(dim=1))
    print(f"{len(manifest)} images, {options.arch}, threshold {options.threshold}, torch {torch.__version__}\n")
    rows = []
    for name in MAPS:
        cells = [torch.cat(x[name]).mean() for x in (correlation, overlap, share)]
        flops = step_flops(model, images[:8].float().movedim(-1, 1) / 255, labels[:8], name)
        rows.append((name, f"{flops:.2f} F", *(f"{cell:.2f}" for cell in cells)))
    print("\n".join(table(("map", "step", "rank correlation", "overlap of masks", "share masked"), rows, left=1)))


if __name__ == "__main__":
    main()
