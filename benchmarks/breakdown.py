"""One step phase by phase: what each takes, how many FLOPs it counts, and how many the theory says.

The real step runs; its calls into the models, the map, autograd and the optimiser are watched from outside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.methods import CounterfactualDistiller, MaskStrategy
from maskcf_fast.methods.label_map import LabelMap
from maskcf_fast.models import VisionTransformer, VisionTransformerConfig, preset

from . import measure as m
from .flops import complete_flop_counter, forward_flops
from .workload import CLASSES, Variant, Workload

PHASES = (
    *("embed", "clean forward", "map", "task backward", "teacher", "masked forward", "masked backward"),
    *("clip and optimiser", "rest"),
)
ROUNDS = (3, 15)


@contextmanager
def watched(work: Workload, method: CounterfactualDistiller, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """How much ``read`` (a clock, a counter) goes on during each phase of the steps within; the rest is the caller's.

    Encoding and autograd's passes come twice in a step: of the clean images, then of the masked ones.
    """
    found = dict.fromkeys(PHASES, 0.0)
    inside = False
    turns: dict[tuple[str, ...], int] = {}

    def phase(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*args, **options)
            inside = True
            turn = turns[names] = turns.get(names, -1) + 1
            start = read()
            try:
                return function(*args, **options)
            finally:
                found[names[turn % len(names)]] += read() - start
                inside = False

        return call

    student, teacher = method.student.backbone, cast(VisionTransformer, method.teacher)
    places: list[tuple[Any, str, tuple[str, ...]]] = [
        *((student, name, ("embed",)) for name in ("rows", "embed_rows")),
        (student, "encode", ("clean forward", "masked forward")),
        (method.student.head, "forward", ("clean forward",)),
        (LabelMap, "__call__", ("map",)),
        *((teacher, name, ("teacher",)) for name in ("rows", "embed_rows", "encode")),
        (torch.autograd, "backward", ("task backward", "masked backward")),
        (torch.nn.utils, "clip_grad_norm_", ("clip and optimiser",)),
        (work.optimizer, "step", ("clip and optimiser",)),
    ]
    with ExitStack() as stack:
        for where, name, phases in places:
            function = getattr(where, name)
            wrapped = phase(function, *phases)
            if where is LabelMap:
                wrapped = _as_method(wrapped)
            stack.enter_context(patch.object(where, name, wrapped))
        yield found


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **options: function(self, *args, **options)


def theory(config: VisionTransformerConfig, batch: int, method: str, classes: int = CLASSES) -> dict[str, int]:
    """FLOPs of each phase for a refill strategy: matrix products alone, an addition and a multiplication each.

    Backward, a linear layer takes two products for one (one where only data gradients are formed), fused attention
    five for two, since it computes the map again. The last block computes the class token alone.
    """
    t, w, layers, d = 1 + config.num_patches, config.width, config.depth, config.feature_dim
    embed = 2 * config.num_patches * w * 3 * config.patch_size**2
    linear, attention = 24 * t * w * w, 4 * t * t * w  # of a block
    last_linear, last_attention = 4 * t * w * w + 20 * w * w, 4 * t * w  # keys and values of all, the rest of one
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
    }
    return {name: batch * per_image.get(name, 0) for name in PHASES}


def count(work: Workload, variant: Variant) -> dict[str, int]:
    """FLOPs of each phase, as `torch.utils.flop_counter` counts them."""
    method = cast(CounterfactualDistiller, work.method(variant))
    with (
        FlopCounterMode(display=False) as counter,
        watched(work, method, lambda: float(counter.get_total_flops())) as found,
    ):
        work.step(lambda: method.backward(work.images, work.labels, draw=work.draw(variant)))()
    return {name: int(flops) for name, flops in found.items()} | {
        "rest": int(counter.get_total_flops() - sum(found.values()))
    }


def measure(
    device: torch.device,
    seconds: float,
    arch: str = "ViT-B/32",
    batch: int = 16,
    precision: str = "fp32",
    method: str = "object-single",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time every phase, waiting for the device before and after each, and count its FLOPs.

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
    flops = count(work, variant)  # this also warms up
    distiller = cast(CounterfactualDistiller, work.method(variant))
    step = work.step(lambda: distiller.backward(work.images, work.labels, generator=work.generator))
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    whole: list[float] = []

    def clock() -> float:
        m.synchronize(device)
        return time.perf_counter()

    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() > end:
            break
        start = clock()
        with watched(work, distiller, clock) as found:
            step()
        found["rest"] = clock() - start - sum(found.values())
        for name, taken in found.items():
            times[name].append(taken)
        whole.append(m.timed(step, device))
    expected = theory(config, batch, method) if not MaskStrategy.from_name(method).filling.leaves_out else {}
    rows = [
        {
            "name": name,
            "ms": 1e3 * statistics.median(times[name]),
            "iqr_ms": 1e3 * m.spread(times[name]),
            "flops": flops[name],
            "theory": expected.get(name),
        }
        for name in PHASES
    ]
    where = {"arch": arch, "batch": batch, "method": method, "precision": precision}
    totals = {"forward": batch * forward_flops(config), "whole_ms": 1e3 * statistics.median(whole)}
    return where | totals | {"phases": rows}
