"""One training step in all its variants: time, arithmetic and memory, against the paper's order (`benchmarks.report`).

A step is zeroing, backward, clipping and fused AdamW. The learning rate is 0, so that every variant does the same work
on the same weights. Variants of a model and batch size are timed in turns, in the same rounds; each is checked first.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.models import preset

from . import check
from . import measure as m
from .flops import complete_flop_counter, forward_flops
from .workload import STRATEGIES, Variant, Workload, products

ROUNDS = (3, 15)
RUNS = 4 + ROUNDS[0]  # of a variant: check, warm-up with the FLOP counter, peak memory, first timing, and the rounds
MEMORY = 0.85  # share of the free memory that a group is planned to take: allocators leave gaps
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square product that utilisation is measured against
TOGETHER = 2  # a group's first variants: a baseline and what is held against it

Cell = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Group:
    """Variants of one model, the most important first, and the images they would like: halved until they fit."""

    arch: str
    batch: int
    variants: tuple[Variant, ...]


def plan(kind: str) -> list[Group]:
    """What to measure, the most important first; what the time does not allow is dropped from the end.

    On a GPU the paper's order takes 0.6 GB (ViT-B/16) to 2.1 GB (ViT-L/14) per image in float32: it is compared at a
    size that fits both, and the step alone is measured at sizes that fill the device.
    """
    single, paper = Variant("object-single"), Variant("object-single").paper()
    if kind == "cpu":
        main = (paper, single, Variant("random-single"))
        bf16 = (single._replace(precision="bf16"), paper._replace(precision="bf16"))
        more = (single._replace(run="compiled"), Variant("FT"), Variant("FD"), single._replace(order="one graph"))
        rest = tuple(Variant(name) for name in STRATEGIES if name not in ("object-single", "random-single"))
        return [
            Group("ViT-B/32", 16, (*main, *bf16)),
            Group("ViT-L/14", 2, main[:2]),
            Group("ViT-B/32", 8, (*main[:2], *more, *rest, paper._replace(run="compiled"))),
            Group("ViT-B/16", 8, main),
            Group("ViT-B/32", 64, main),
        ]
    low = single._replace(precision="bf16")
    fast = (low._replace(run="graphed"), low._replace(run="compiled"))
    random = tuple(variant._replace(method="random-single") for variant in (*fast[:1], low))
    compared = (
        low.paper(), low, *fast, *random, paper, paper._replace(precision="tf32"), single,
        low.paper(run="compiled"),
    )  # fmt: skip
    others = [name for name in (*STRATEGIES, "FT", "FD") if name not in ("object-single", "random-single")]
    return [
        Group("ViT-B/16", 128, compared),
        Group("ViT-B/16", 256, (low, *fast, *random)),
        Group("ViT-L/14", 32, compared),
        Group("ViT-L/14", 128, (low, *fast, *random)),
        Group("ViT-B/32", 256, (*compared, *(Variant(name, precision="bf16") for name in others),
                                low._replace(order="one graph"))),
    ]  # fmt: skip


def matrix_rate(device: torch.device, seconds: float = 2.0) -> dict[str, float]:
    """FLOP/s of a large square product, by precision: what utilisation is measured against."""
    size, rates = MATRIX[device.type], {}
    for name in ("fp32", "tf32", "bf16"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with products(name):
            samples = m.interleaved({name: partial(torch.mm, a, b)}, device, seconds=seconds / 3)
        rates[name] = 2 * size**3 / min(samples[name])
    return rates


def measure(
    device: torch.device,
    seconds: float,
    groups: Sequence[Group] | None = None,
    progress: Progress = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda so_far: None,
) -> dict[str, Any]:
    """Measure groups of variants within about ``seconds``.

    Args:
        device: Where.
        seconds: Time to spend.
        groups: What to measure; by default `plan`.
        progress: Called with a line before each group and variant.
        keep: Called after each group with the results so far.

    Returns:
        ``matrix_rate`` (FLOP/s by precision) and ``cells``: one per variant, with figures or ``not_measured``.
    """
    complete_flop_counter()
    end = time.perf_counter() + seconds
    found: dict[str, Any] = {"matrix_rate": matrix_rate(device), "cells": []}
    for group in plan(device.type) if groups is None else groups:
        try:
            found["cells"] += measure_group(group, device, end, found["matrix_rate"], progress)
        except Exception as error:  # what breaks a whole group must not cost the others their figures
            found["cells"] += [_absent(group, variant, m.first_line(error)) for variant in group.variants]
        keep(found)
    return found


def fit(group: Group, device: torch.device, seconds: float) -> tuple[Group, str | None]:
    """The group with as many images as memory and time allow, and why there are none.

    Bytes and seconds per image are measured beforehand, on a few images. Memory is planned for the greatest step and
    for what each graph keeps; time for the first variants, a baseline and what is held against it.
    """
    config = preset(group.arch)
    n = min(check.SMALL[device.type], group.batch)
    work = Workload(config, n, device)
    free = m.free_memory(device)
    need: dict[str, float] = {}  # bytes per image, by order
    took: dict[str, float] = {}
    precision = "fp32" if any(variant.precision != "bf16" for variant in group.variants) else "bf16"
    for variant in dict.fromkeys(v._replace(run="eager", precision=precision) for v in group.variants[:TOGETHER]):
        backward = work.backward(variant)
        peak = work.peak_memory(backward)
        start = time.perf_counter()
        work.step(backward)()
        m.synchronize(device)
        took[variant.order] = (time.perf_counter() - start) / n
        need[variant.order] = (peak or 0) / n
    graphs = sum(variant.run == "graphed" for variant in group.variants)
    image = max(need.values()) + graphs * need.get("two passes", 0.0)
    time_per_image = RUNS * sum(took[variant.order] for variant in group.variants[:TOGETHER])
    batch = group.batch
    while batch > 2 and (batch * time_per_image > seconds or (free is not None and batch * image > MEMORY * free)):
        batch //= 2
    reason = None
    if batch * time_per_image > seconds:
        reason = f"needs about {batch * time_per_image:.0f} s, {max(seconds, 0):.0f} s left"
    elif free is not None and batch * image > MEMORY * free:
        reason = f"needs about {batch * image / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return Group(group.arch, batch, group.variants), reason


def measure_group(
    group: Group, device: torch.device, end: float, rate: dict[str, float], progress: Progress = lambda line: None
) -> list[Cell]:
    """Check, count, weigh, and time in turns; what runs over ``end`` (of `time.perf_counter`) is given up."""
    left = end - time.perf_counter()
    if left <= 0:
        return [_absent(group, variant, "the time was over") for variant in group.variants]
    _clean_up(device)
    progress(f"step: {group.arch}, {len(group.variants)} variants")
    config = preset(group.arch)
    group, reason = fit(group, device, left)
    if reason is not None:
        return [_absent(group, variant, reason) for variant in group.variants]
    progress(f"  N={group.batch}")
    checks = check.against_paper(config, device, [variant for variant in group.variants if variant.run == "eager"])
    _clean_up(device)
    work = Workload(config, group.batch, device)
    cells: dict[Variant, Cell] = {}
    calls: dict[str, Callable[[], None]] = {}
    ahead = 0.0  # seconds that the variants accepted so far need in the rounds
    for variant in group.variants:
        if calls and time.perf_counter() + ahead > end:
            cells[variant] = _absent(group, variant, "the time was over")
            continue
        progress(f"  {variant}")
        try:
            cells[variant], calls[str(variant)], took = _prepared(work, group, variant, checks)
            ahead += took * (1 + ROUNDS[0])
        except Exception as error:  # one variant must not cost the others their figures
            cells[variant] = _absent(group, variant, m.first_line(error))
        work.optimizer.zero_grad(set_to_none=True)
        _clean_up(device)
    failed: dict[str, str] = {}
    # The device's time is shared by groups: a group that is quick does not use it up on more rounds.
    seconds = min(end - time.perf_counter(), 2 * ahead)
    samples = m.interleaved(calls, device, seconds=seconds, rounds=ROUNDS, failed=failed)
    for variant, cell in cells.items():
        if samples.get(str(variant)):  # what ran out of memory in a later round keeps what it has
            cells[variant] = cell | _figures(samples, variant, cells, rate)
        elif str(variant) in failed:
            cells[variant] = _absent(group, variant, failed[str(variant)])
    work.optimizer.zero_grad(set_to_none=True)
    return list(cells.values())


def _prepared(
    work: Workload, group: Group, variant: Variant, checks: dict[Variant, str]
) -> tuple[Cell, Callable[[], None], float]:
    """What can be said of a variant without timing it, its step, and about how many seconds that takes."""
    backward = work.backward(variant)
    if variant.run == "eager":
        status = checks[variant]
    elif variant.run == "compiled":
        status = check.against_eager(work, variant)
    else:
        status = check.graph_against_kernels(work, variant, backward)
    call = work.step(backward)
    flops = None
    if variant.run == "eager":
        with FlopCounterMode(display=False) as counter:
            call()
        flops = counter.get_total_flops()
    else:
        call()
    peak = None if variant.run == "graphed" else work.peak_memory(backward)
    took = m.timed(call, work.device)
    facts = {"flops": flops, "peak_bytes": peak, "state_bytes": work.state_bytes, "check": status}
    return _named(group, variant) | facts, call, took


def _figures(
    samples: dict[str, list[float]], variant: Variant, cells: dict[Variant, Cell], rate: dict[str, float]
) -> Cell:
    times, cell = samples[str(variant)], cells[variant]
    median, images = statistics.median(times), cell["batch"]
    same = [other for other in cells if (other.method, other.order) == (variant.method, variant.order)]
    flops = cell["flops"] or next((cells[other]["flops"] for other in same if cells[other].get("flops")), None)
    found: Cell = {
        "rounds": len(times),
        "ms": 1e3 * median,
        "iqr_ms": 1e3 * m.spread(times),
        "images_s": images / median,
        "flops": flops,
        "forwards": flops and flops / (images * forward_flops(preset(cell["arch"]))),
        "utilisation": flops and flops / median / rate[variant.precision],
    }
    if cell["check"] == "ok":
        others = {
            "paper": variant.paper(),
            **{f"paper {name}": variant.paper(precision=name) for name in ("fp32", "tf32")},
            "paper compiled": variant.paper(run="compiled"),
            "random": variant._replace(method=f"random-{variant.method.rpartition('-')[2]}"),
        }
        found["times_as_fast"] = {
            name: m.ratio(samples[str(other)], times)
            for name, other in others.items()
            if samples.get(str(other)) and other != variant
        }
    return found


def _clean_up(device: torch.device) -> None:
    """Give back what a variant that failed, or the last group's graphs, held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _named(group: Group, variant: Variant) -> Cell:
    return {"arch": group.arch, "batch": group.batch} | variant._asdict()


def _absent(group: Group, variant: Variant, reason: str) -> Cell:
    return _named(group, variant) | {"not_measured": reason}
