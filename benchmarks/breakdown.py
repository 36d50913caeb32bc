"""One step phase by phase: what each takes, how many FLOPs it counts, and how many the theory says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.core.precision import autocast
from maskcf_fast.methods import CounterfactualDistiller, Draw
from maskcf_fast.methods.counterfactual import encode_masked
from maskcf_fast.methods.losses import feature_loss, task_loss
from maskcf_fast.models import VisionTransformer, VisionTransformerConfig, preset

from . import measure as m
from .flops import complete_flop_counter, forward_flops
from .workload import CLASSES, Variant, Workload

PHASES = (
    *("embed", "clean forward", "map", "task backward", "teacher", "masked forward", "masked backward"),
    "clip and optimiser",
)
ROUNDS = (3, 15)


def phases(work: Workload, method: CounterfactualDistiller, draw: Draw) -> Iterator[str]:
    """`CounterfactualDistiller.backward`, then clipping and the optimiser; the phase's name after each of `PHASES`."""
    student, teacher = method.student.backbone, cast(VisionTransformer, method.teacher)

    def precision() -> Any:  # not held while the caller looks at the clock
        return autocast(work.device, method.precision)

    with precision():
        rows = student.rows(work.images)
        tokens = student.embed_rows(rows)
    shared = tokens.detach().requires_grad_()
    yield "embed"
    with precision():
        feature, taps = student.encode(shared, record=method.strategy.needs_cam)
        logits = method.student.head(feature)
        task = task_loss(logits, work.labels)
    yield "clean forward"
    cam = method.map(logits, work.labels, taps) if taps else None
    mask = method.strategy.mask(cam, draw)
    yield "map"
    task.backward()
    del feature, taps, logits, task
    yield "task backward"
    with torch.no_grad(), precision():
        target = encode_masked(teacher, teacher.embed_rows(rows), mask, draw.donors, method.strategy)
    yield "teacher"
    with precision():
        masked = encode_masked(student, tokens, mask, draw.donors, method.strategy)
        loss = method.weight * feature_loss(masked, target)
    yield "masked forward"
    torch.autograd.backward([loss, tokens], [torch.ones_like(loss), cast(Tensor, shared.grad)])
    yield "masked backward"
    torch.nn.utils.clip_grad_norm_(work.parameters, 1.0, foreach=True)
    work.optimizer.step()
    yield "clip and optimiser"


def theory(config: VisionTransformerConfig, batch: int, method: str, classes: int = CLASSES) -> dict[str, int]:
    """FLOPs of each phase for a refill strategy: matrix products alone, an addition and a multiplication each.

    Backward, a linear layer takes two products for one (one where only data gradients are formed), fused attention
    five for two, since it computes the map again. The last block computes the class token alone.
    """
    t, w, layers, d = 1 + config.num_patches, config.width, config.depth, config.feature_dim
    embed = 2 * config.num_patches * w * 3 * config.patch_size**2
    linear, attention = 24 * t * w * w, 4 * t * t * w  # of a block
    last_linear, last_attention = (
        4 * t * w * w + 20 * w * w,
        4 * t * w,
    )  # keys and values of all tokens, the rest of one
    out = 0 if config.output_dim is None else 2 * w * d
    head = 2 * d * classes
    encode = (layers - 1) * (linear + attention) + last_linear + last_attention + out
    backward = (layers - 1) * (2 * linear + 5 * attention // 2) + 2 * (last_linear + out) + 5 * last_attention // 2
    # Data gradients from the logits down to the first layer's attention output; two products per layer for the row.
    through = (layers - 1) * (linear + 5 * attention // 2) + last_linear + 5 * last_attention // 2 + out + head
    first_qkv = 6 * t * w * w if layers > 1 else 4 * t * w * w + 2 * w * w
    first_attention = attention if layers > 1 else last_attention
    relevance = (layers - 1) * attention + last_attention
    needs_map = not method.startswith("random")
    per_image = {
        "embed": embed,
        "clean forward": encode + head,
        "map": through - first_qkv - 5 * first_attention // 2 + relevance if needs_map else 0,
        "task backward": backward + 2 * head,
        "teacher": embed + encode,
        "masked forward": encode,
        "masked backward": backward + embed,
        "clip and optimiser": 0,
    }
    return {name: batch * flops for name, flops in per_image.items()}


def measure(
    device: torch.device,
    seconds: float,
    arch: str = "ViT-B/32",
    batch: int = 16,
    precision: str = "fp32",
    method: str = "object-single",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time every phase, waiting for the device after each, and count its FLOPs.

    Returns:
        ``phases``: name, ms, iqr_ms, flops, theory, all per step; ``forward`` is F, of the batch; ``whole_ms`` is the
        step without waiting in between.
    """
    complete_flop_counter()
    progress(f"breakdown: {arch}, N={batch}, {method}, {precision}")
    end = time.perf_counter() + seconds
    config = preset(arch)
    work = Workload(config, batch, device)
    variant = Variant(method, precision=precision)
    distiller = cast(CounterfactualDistiller, work.method(variant))
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    whole: list[float] = []
    flops = count(work, distiller)  # this also warms up
    step = work.step(work.backward(variant))
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() > end:
            break
        work.optimizer.zero_grad(set_to_none=True)
        m.synchronize(device)
        start = time.perf_counter()
        for name in phases(work, distiller, work.draw(distiller.strategy)):
            m.synchronize(device)
            now = time.perf_counter()
            times[name].append(now - start)
            start = now
        whole.append(m.timed(step, device))
    expected = theory(config, batch, method)
    rows = [
        {
            "name": name,
            "ms": 1e3 * statistics.median(times[name]),
            "iqr_ms": 1e3 * m.spread(times[name]),
            "flops": flops[name],
            "theory": expected[name] if distiller.strategy.fill != "none" else None,
        }
        for name in PHASES
    ]
    return {
        "arch": arch,
        "batch": batch,
        "method": method,
        "precision": precision,
        "forward": batch * forward_flops(config),
        "whole_ms": 1e3 * statistics.median(whole),
        "phases": rows,
    }


def count(work: Workload, method: CounterfactualDistiller) -> dict[str, int]:
    """FLOPs of each phase, as `torch.utils.flop_counter` counts them."""
    work.optimizer.zero_grad(set_to_none=True)
    found: dict[str, int] = {}
    parts = phases(work, method, work.draw(method.strategy))
    for _ in PHASES:
        with FlopCounterMode(display=False) as counter:
            name = next(parts)
        found[name] = counter.get_total_flops()
    return found
