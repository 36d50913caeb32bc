"""One training step in all its variants: time, arithmetic and memory, against the paper's order (`benchmarks.report`).

A step is zeroing, backward, clipping and fused AdamW. The learning rate is 0, so that every variant does the same work
on the same weights. Variants of a model and batch size are timed in turns, in the same rounds.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.core.precision import slow_products
from maskcf_fast.models import VisionTransformerConfig, preset
from maskcf_fast.training.cost import complete_flop_counter, forward_flops

from . import measure as m
from .workload import STRATEGIES, Variant, Workload, products

ROUNDS = (3, 15)
RUNS = 3 + ROUNDS[0]  # of a variant: warm-up with the FLOP counter, peak memory, first timing, and the rounds
MEMORY = 0.85  # share of the free memory that a group is planned to take: allocators leave gaps
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square product that utilisation is measured against
TOGETHER = 2  # a group's first variants: a baseline and what is held against it
FEW = {"cpu": 2, "cuda": 8}  # images, to measure what one takes

Cell = dict[str, Any]
Series = tuple[str, int, Mapping[str, Sequence[int]]]
SERIES: dict[str, Series] = {  # by kind of device: model, batch, and the values of each series
    "cpu": ("ViT-B/32", 4, {"tokens": (224, 320, 448, 640), "batch": (2, 4, 8, 16), "depth": (3, 6, 12)}),
    "cuda": ("ViT-B/16", 64, {"tokens": (160, 224, 320), "batch": (16, 32, 64), "depth": (3, 6, 12)}),
}
SINGLE = Variant("object-single")


@dataclass(frozen=True)
class Group:
    """Variants of one model, the most important first, and the images they would like: halved until they fit."""

    arch: str
    batch: int
    variants: tuple[Variant, ...]
    least: int = 2  # images
    changes: Mapping[str, int] = field(default_factory=dict)  # of the preset

    @property
    def config(self) -> VisionTransformerConfig:
        changes: Any = self.changes
        return replace(preset(self.arch), **changes)

    def cell(self, variant: Variant, **found: Any) -> Cell:
        return {"arch": self.arch, "batch": self.batch} | variant._asdict() | found


def plan(kind: str) -> list[Group]:
    """What to measure, the most important first; what the time does not allow is dropped from the end.

    On a GPU the paper's order takes 0.6 GB (ViT-B/16) to 2.1 GB (ViT-L/14) per image in float32: it is compared at a
    size that fits both, and the step alone is measured at sizes that fill the device.
    """
    paper, low = SINGLE.paper(), SINGLE._replace(precision="bf16")
    others = [name for name in (*STRATEGIES, "FT", "FD") if name not in ("object-single", "random-single")]
    if kind == "cpu":
        plain = Variant("random-single")
        main, plainly = (paper, SINGLE, plain), (plain, plain._replace(run="compiled blocks"))
        more = (
            SINGLE._replace(run="compiled"),
            *plainly,
            Variant("FT"),
            Variant("FD"),
            SINGLE._replace(order="one graph"),
        )
        rest = tuple(Variant(name) for name in others if name in STRATEGIES)
        in_bf16 = (low, low.paper()) if slow_products(torch.device(kind), "bf16") is None else ()
        return [
            Group("ViT-B/32", 16, (*main, *in_bf16)),
            Group("ViT-L/14", 2, main[:2]),
            Group("ViT-B/32", 8, (*main[:2], *more, *rest, paper._replace(run="compiled"))),
            Group("ViT-B/16", 8, main),
            Group("ViT-B/32", 64, main),
        ]
    fast = tuple(low._replace(run=run) for run in ("graphed", "compiled"))
    blocks = low._replace(run="compiled blocks")
    random = tuple(variant._replace(method="random-single") for variant in (*fast[:1], low, blocks))
    baselines = (paper, paper._replace(precision="tf32"), SINGLE, low.paper(run="compiled"))
    compared = (low.paper(), low, *fast, *random, *baselines)
    rest = (*(Variant(name, precision="bf16") for name in others), low._replace(order="one graph"))
    return [
        Group("ViT-B/16", 128, compared),
        Group("ViT-B/16", 256, (low, *fast, *random)),
        Group("ViT-L/14", 32, compared),
        Group("ViT-L/14", 128, (low, *fast, *random)),
        Group("ViT-B/32", 256, (*compared, *rest)),
    ]


def matrix_rate(device: torch.device, seconds: float = 2.0) -> dict[str, float]:
    """FLOP/s of a large square product, by precision: what utilisation is measured against."""
    rates = {}
    for name in ("fp32", "tf32", "bf16"):
        size = min(MATRIX[device.type], 256) if slow_products(device, name) else MATRIX[device.type]
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with products(name):
            samples = m.interleaved({name: partial(torch.mm, a, b)}, device, seconds=seconds / 3)
        rates[name] = 2 * size**3 / min(samples[name])
    return rates


def measure(
    found: dict[str, Any],
    device: torch.device,
    seconds: float,
    groups: Iterable[Group] | None = None,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Measure groups of variants, by default those of `plan`, within about ``seconds``.

    ``found`` is filled with ``matrix_rate`` (FLOP/s by precision) and ``cells``, one per variant, with figures or
    ``not_measured``; ``keep`` is called after each group.
    """
    end = time.perf_counter() + seconds
    found |= {"matrix_rate": matrix_rate(device), "cells": []}
    for group in plan(device.type) if groups is None else groups:
        found["cells"] += measure_group(group, device, end, found["matrix_rate"])
        keep()


def measure_group(
    group: Group, device: torch.device, end: float, rate: Mapping[str, float] | None = None
) -> list[Cell]:
    """A cell for every variant; what runs over ``end`` (of `time.perf_counter`) is given up, by name."""
    complete_flop_counter()
    m.progress(f"step: {group.arch}, {group.batch} images, {len(group.variants)} variants {dict(group.changes) or ''}")
    try:
        group, reason = fit(group, device, end - time.perf_counter())
        if reason is None:
            return _measured(group, device, end, rate)
    except Exception as error:  # what breaks a whole group must not cost the others their figures
        reason = m.first_line(error)
    return [group.cell(variant, not_measured=reason) for variant in group.variants]


def fit(group: Group, device: torch.device, seconds: float) -> tuple[Group, str | None]:
    """The group with as many images as memory and time allow, and why there are none.

    Bytes and seconds per image are measured beforehand, on a few images. Memory is planned for the greatest step and
    for what each graph keeps; time for the first variants, a baseline and what is held against it.
    """
    if seconds <= 0:
        return group, "the time was over"
    n = min(FEW[device.type], group.batch)
    work, free = Workload(group.config, n, device), m.free_memory(device)
    need: dict[str, float] = {}  # bytes per image, by order
    took: dict[str, float] = {}  # seconds per image
    precision = "fp32" if any(variant.precision != "bf16" for variant in group.variants) else "bf16"
    first = [variant._replace(run="eager", precision=precision) for variant in group.variants[:TOGETHER]]
    for variant in dict.fromkeys(first):
        backward = work.backward(variant)
        need[variant.order] = (work.peak_memory(backward) or 0) / n
        took[variant.order] = m.timed(work.step(backward), device) / n
    seconds_each = RUNS * sum(took[variant.order] for variant in first)
    image = max(need.values()) + sum(v.run == "graphed" for v in group.variants) * need.get("two passes", 0.0)
    room = math.inf if free is None else MEMORY * free
    batch = group.batch
    while batch // 2 >= group.least and (batch * seconds_each > seconds or batch * image > room):
        batch //= 2
    reason = None
    if batch * seconds_each > seconds:
        reason = f"needs about {batch * seconds_each:.0f} s, {seconds:.0f} s left"
    elif batch * image > room:
        reason = f"needs about {batch * image / 1e9:.1f} GB of memory, {(free or 0) / 1e9:.1f} GB are free"
    return replace(group, batch=batch), reason


def _measured(group: Group, device: torch.device, end: float, rate: Mapping[str, float] | None) -> list[Cell]:
    """Count, weigh, and time in turns."""
    _clean_up(device)
    work = Workload(group.config, group.batch, device)
    cells: dict[Variant, Cell] = {}
    calls: dict[str, m.Call] = {}
    ahead = 0.0  # seconds that the variants accepted so far need in the rounds
    for variant in group.variants:
        if calls and time.perf_counter() + ahead > end:
            cells[variant] = group.cell(variant, not_measured="the time was over")
            continue
        m.progress(f"  {variant}")
        try:
            backward = work.backward(variant)
            call = work.step(backward)
            eager = variant.run == "eager"  # else there is nothing to count: products are within what is compiled
            with FlopCounterMode(display=False) if eager else nullcontext() as counter:  # this also warms up
                call()
            flops = counter.get_total_flops() if counter else None
            peak = None if variant.run == "graphed" else work.peak_memory(backward)
            cells[variant] = group.cell(variant, flops=flops, peak_bytes=peak)
            ahead += m.timed(call, device) * (1 + ROUNDS[0])
            calls[str(variant)] = call
        except Exception as error:  # one variant must not cost the others their figures
            cells[variant] = group.cell(variant, not_measured=m.first_line(error))
        work.optimizer.zero_grad(set_to_none=True)
        _clean_up(device)
    failed: dict[str, str] = {}
    # The device's time is shared by groups: a group that is quick does not use it up on more rounds.
    seconds = min(end - time.perf_counter(), 2 * ahead)
    samples = m.interleaved(calls, device, seconds=seconds, rounds=ROUNDS, failed=failed)
    for variant, cell in cells.items():
        if samples.get(str(variant)):  # what ran out of memory in a later round keeps what it has
            cells[variant] = cell | _figures(samples, variant, cells, group, rate or {})
        elif str(variant) in failed:
            cells[variant] = group.cell(variant, not_measured=failed[str(variant)])
    return list(cells.values())


def _figures(
    samples: dict[str, list[float]],
    variant: Variant,
    cells: dict[Variant, Cell],
    group: Group,
    rate: Mapping[str, float],
) -> Cell:
    times = samples[str(variant)]
    seconds = statistics.median(times)
    same = [c for other, c in cells.items() if (other.method, other.order) == (variant.method, variant.order)]
    flops = cells[variant]["flops"] or next((c["flops"] for c in same if c.get("flops")), None)
    others = {
        "paper": variant.paper(),
        **{f"paper {name}": variant.paper(precision=name) for name in ("fp32", "tf32")},
        "paper compiled": variant.paper(run="compiled"),
        "compiled blocks": variant._replace(run="compiled blocks"),
        "random": variant._replace(method=f"random-{variant.method.rpartition('-')[2]}"),
    }
    return m.summary(times) | {
        "rounds": len(times),
        "images_s": group.batch / seconds,
        "flops": flops,
        "forwards": flops and flops / (group.batch * forward_flops(group.config)),
        "utilisation": flops and variant.precision in rate and flops / seconds / rate[variant.precision],
        "times_as_fast": {
            name: m.ratio(samples[str(other)], times)
            for name, other in others.items()
            if samples.get(str(other)) and other != variant
        },
    }


def _clean_up(device: torch.device) -> None:
    """Give back what a variant that failed, or the last group's graphs, held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def scaling(device: torch.device, seconds: float, series: Series | None = None) -> dict[str, Any]:
    """How time and memory of the step, and of the paper's order, grow.

    Args:
        device: Where.
        seconds: Time to spend, shared by the series; values that do not fit are left out, by name.
        series: Model, batch, and values by series; tokens are given as image sizes, with half the depth.

    Returns:
        By series, ``points`` and ``exponents`` (least squares on logarithms) of time and memory by order.
    """
    arch, images, values = series or SERIES[device.type]
    step = SINGLE._replace(precision="bf16" if device.type == "cuda" else "fp32")
    found: dict[str, Any] = {"arch": arch, "images": images, "precision": step.precision, "method": step.method}
    end = time.perf_counter() + seconds
    for i, (name, sizes) in enumerate(values.items()):
        until = time.perf_counter() + (end - time.perf_counter()) / (len(values) - i)
        points: list[dict[str, Any]] = []
        for size in sizes:
            half = max(preset(arch).depth // 2, 1)
            changes = {"depth": {"depth": size}, "tokens": {"image_size": size, "depth": half}}.get(name, {})
            n = size if name == "batch" else images
            group = Group(arch, n, (step.paper(), step), n, changes)
            x = 1 + group.config.num_patches if name == "tokens" else size
            cells = dict(zip(("paper", "step"), measure_group(group, device, until), strict=True))
            reasons = [cell["not_measured"] for cell in cells.values() if "ms" not in cell]
            kept = {"ms": "ms", "bytes": "peak_bytes"}
            figures = {f"{who}_{what}": c[key] for who, c in cells.items() for what, key in kept.items() if key in c}
            points.append({"x": x} | ({"not_measured": reasons[0]} if reasons else figures))
        names = [key for key in points[0] if key not in ("x", "not_measured")]
        powers = {key: exponent([(p["x"], p[key]) for p in points if p.get(key)]) for key in names}
        found[name] = {"points": points, "exponents": powers}
    return found


def exponent(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Slope of log y over log x by least squares; None with fewer than two values of x."""
    if len({x for x, _ in pairs}) < 2:
        return None
    xs, ys = ([math.log(value) for value in column] for column in zip(*pairs, strict=True))
    return statistics.linear_regression(xs, ys).slope
