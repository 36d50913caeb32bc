"""``python -m benchmarks.step``: one training step, in arithmetic and in time, against the paper's order.

F is one plain forward pass of the student, every token in every block; arithmetic is counted by
`torch.utils.flop_counter`, time is the median over rounds that take the variants in turn.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from maskcf_fast import _native
from maskcf_fast.distill import (
    CounterfactualDistiller,
    FeatureDistillation,
    FineTuning,
    MaskStrategy,
    paper_order_step,
)
from maskcf_fast.distill.paper_order import plain_forward
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast._precision import autocast
from maskcf_fast.training.log import cpu_name


@dataclass(frozen=True)
class Config:
    """One training step against the paper's order of computation."""

    arch: str = "ViT-B/32"
    """Preset of the model; random weights."""
    batch: int = 16
    """Images per step."""
    strategy: str = "object-single"
    """Masking strategy of the counterfactual step."""
    rounds: int = 7
    """Timed steps per variant."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""


def count_relevance() -> None:
    """Tell the FLOP counter about the compiled relevance op: two products of [Tq, d] and [d, T] per head."""
    if _native.loading_error() is None:

        @register_flop_formula(torch.ops.maskcf.attention_relevance)
        def flops(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
            n, heads, queries, width = q
            return 2 * 2 * n * heads * queries * k[2] * width


def variants(config: Config) -> dict[str, Callable[[], Tensor]]:
    """Each variant's loss, ready for ``backward``."""
    torch.manual_seed(0)
    backbone = VisionTransformer(config.arch)
    student = ImageClassifier(backbone, CosineClassifier(backbone.config.feature_dim, 1000)).to(config.device)
    teacher = copy.deepcopy(student.backbone).requires_grad_(False)
    side = backbone.config.image_size
    images = torch.rand(config.batch, 3, side, side, device=config.device)
    labels = torch.randint(1000, (config.batch,), device=config.device)
    masked = MaskStrategy.from_name(config.strategy)
    random = MaskStrategy.from_name(f"random-{masked.fill}")
    draws = {s: s.draw(config.batch, backbone.config.num_patches, device=config.device) for s in (masked, random)}

    def step(method: torch.nn.Module, **draw: object) -> Callable[[], Tensor]:
        return lambda: method(images, labels, **draw).loss

    return {
        f"{masked.name}, paper's order": lambda: (
            paper_order_step(student, teacher, masked, images, labels, draws[masked]).loss
        ),
        masked.name: step(CounterfactualDistiller(student, teacher, masked), draw=draws[masked]),
        random.name: step(CounterfactualDistiller(student, teacher, random), draw=draws[random]),
        "feature distillation": step(FeatureDistillation(student, teacher)),
        "fine-tuning": step(FineTuning(student)),
        "forward, plain": lambda: plain_forward(student.backbone, images)[0],
    }


def main(config: Config) -> None:
    """Measure and print the table."""
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{config.arch}, {config.batch} images, {config.precision}\n")
    count_relevance()
    losses = variants(config)

    def run(key: str) -> None:
        with autocast(device, config.precision):
            loss = losses[key]()
        if key != "forward, plain":
            loss.backward()

    flops: dict[str, int] = {}
    seconds: dict[str, list[float]] = {key: [] for key in losses}
    for key in losses:  # this also warms up
        with FlopCounterMode(display=False) as counter:
            run(key)
        flops[key] = counter.get_total_flops()
    for _ in range(config.rounds):
        for key, times in seconds.items():
            _wait(device)
            start = time.perf_counter()
            run(key)
            _wait(device)
            times.append(time.perf_counter() - start)

    unit = flops["forward, plain"]
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    base = next(iter(medians.values()))
    print(f"{'step':34}{'arithmetic':>12}{'ms':>10}{'images/s':>11}{'× as fast':>11}")
    for key, median in medians.items():
        speed = f"{config.batch / median:11.1f}{base / median:11.2f}"
        print(f"{key:34}{flops[key] / unit:10.2f} F{1000 * median:10.1f}{speed}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
