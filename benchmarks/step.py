"""One training step in all its variants: time, arithmetic and memory, against the paper's order (`benchmarks.report`).

A step is zeroing, backward, clipping and fused AdamW. The learning rate is 0, so that every variant does the same work
on the same weights. Variants of a model and batch size are timed in turns, in the same rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
)

from maskcf_fast.models import preset

from . import measure as m
from .flops import complete_flop_counter, forward_flops
from .workload import STRATEGIES, Variant, Workload

ROUNDS = (3, 15)
RUNS_PER_CELL = 3 + ROUNDS[0]  # warm-up with the FLOP counter, peak memory, first timing, and the rounds
HALF_OF_PEAK = 0.5  # share of the matrix rate that a step is assumed to reach, before one was timed
OUT_OF_MEMORY = "out of memory"
TOGETHER = 2  # a group's first variants: a baseline and what is held against it


@dataclass(frozen=True)
class Group:
    """Variants of one model and batch size, the most important first."""

    arch: str
    batch: int
    variants: tuple[Variant, ...]


def matrix_rate(device: torch.device, size: int | None = None, seconds: float = 2.0) -> dict[str, float]:
    """FLOP/s of a large square product, by precision: what utilisation is measured against."""
    size = size or (8192 if device.type == "cuda" else 2048)
    calls = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls[name] = lambda a=a, b=b: a @ b
        calls[name]()
    samples = m.interleaved(calls, device, seconds=seconds)
    return {name: 2 * size**3 / min(times) for name, times in samples.items()}


def plan(kind: str) -> list[Group]:
    """What to measure, the most important first; what the time does not allow is dropped from the end."""
    low = "bf16" if kind == "cuda" else "fp32"
    main = [
        Variant("object-single", "paper"),
        Variant("object-single"),
        Variant("random-single"),
        Variant("object-single", precision="bf16"),
        Variant("object-single", "paper", precision="bf16"),
        Variant("random-single", precision="bf16"),
    ]
    more = [
        *(Variant("object-single", run=run, precision=low) for run in ("compiled", "graphed")),
        *(Variant("random-single", run=run, precision=low) for run in ("compiled", "graphed")),
        *(Variant(name, precision=low) for name in ("FT", "FD")),
        Variant("object-single", "one graph", precision=low),
    ]
    nine = [Variant(name, precision=low) for name in STRATEGIES if name not in ("object-single", "random-single")]
    paper = Variant("object-single", "paper", "compiled", low)
    if kind == "cpu":
        return [
            Group("ViT-B/32", 16, tuple(main[:5])),
            Group("ViT-L/14", 2, tuple(main[:2])),
            Group("ViT-B/32", 8, (Variant("object-single", "paper"), Variant("object-single"), *more, *nine, paper)),
            Group("ViT-B/16", 8, tuple(main[:3])),
            Group("ViT-B/32", 64, tuple(main[:3])),
            Group("ViT-L/14", 4, tuple(main)),
        ]
    every = (*main, *more)
    return [
        Group("ViT-B/16", 256, every),
        Group("ViT-L/14", 64, every),
        Group("ViT-B/32", 256, (*every, *nine, paper)),
        Group("ViT-B/16", 64, every),
        Group("ViT-L/14", 256, tuple(v for v in every if v.order != "paper")),
        Group("ViT-B/32", 64, every),
        Group("ViT-B/32", 1024, tuple(v for v in every if v.order != "paper")),
    ]


def measure(
    device: torch.device,
    seconds: float,
    groups: Sequence[Group] | None = None,
    failed: Callable[[Variant], str | None] = lambda variant: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure groups of variants within about ``seconds``.

    Args:
        device: Where.
        seconds: Time to spend.
        groups: What to measure; by default `plan`.
        failed: Why a variant's correctness check failed, if it did: it is timed, and has no speed-up.
        progress: Called with a line before each group.

    Returns:
        ``matrix_rate`` (FLOP/s by precision) and ``cells``: one per variant, with figures or ``not_measured``.
    """
    complete_flop_counter()
    end = time.perf_counter() + seconds
    rate = matrix_rate(device)
    reached = {name: HALF_OF_PEAK * value for name, value in rate.items()}
    cells: list[dict[str, Any]] = []
    for group in plan(device.type) if groups is None else groups:
        group, dropped = _fit(group, end - time.perf_counter(), reached)
        cells += dropped
        if group.variants:
            progress(f"step: {group.arch}, N={group.batch}, {len(group.variants)} variants")
            measured = _measured(group, device, end, rate, failed, progress)
            while _ran_out(measured) and group.batch >= 4:  # a comparison without its baseline is none
                group = Group(group.arch, group.batch // 2, group.variants)
                progress(f"  out of memory: {group.batch} images instead")
                measured = _measured(group, device, end, rate, failed, progress)
            cells += measured
            for cell in measured:
                if "ms" in cell and cell["run"] == "eager":
                    reached[cell["precision"]] = cell["flops"] / cell["ms"] * 1e3
    return {"matrix_rate": rate, "cells": cells}


def _fit(group: Group, seconds: float, reached: dict[str, float]) -> tuple[Group, list[dict[str, Any]]]:
    """What of a group fits into the time, and cells for what does not.

    The batch is halved, down to 2, until the first variants fit: a comparison without its baseline is none.
    """
    forward = forward_flops(preset(group.arch))

    def takes(variant: Variant, batch: int) -> float:
        return RUNS_PER_CELL * variant.cost * batch * forward / reached[variant.precision]

    batch = group.batch
    first = group.variants[:TOGETHER]
    while batch >= 4 and sum(takes(variant, batch) for variant in first) > seconds:
        batch //= 2
    kept: list[Variant] = []
    cells: list[dict[str, Any]] = []
    left = seconds
    for variant in group.variants:
        needed = takes(variant, batch)
        if cells or needed > left:  # nothing less important instead
            reason = f"needs about {needed:.0f} s, {left:.0f} s left"
            cells.append(_absent(Group(group.arch, batch, ()), variant, reason))
        else:
            left -= needed
            kept.append(variant)
    if len(kept) < min(TOGETHER, len(group.variants)):
        reason = f"needs about {sum(takes(variant, batch) for variant in first):.0f} s, {seconds:.0f} s left"
        return Group(group.arch, batch, ()), [_absent(group, variant, reason) for variant in group.variants]
    return Group(group.arch, batch, tuple(kept)), cells


def _measured(group: Group, *rest: Any) -> list[dict[str, Any]]:
    """`measure_group`; what breaks a whole group must not cost the others their figures."""
    try:
        return measure_group(group, *rest)
    except RuntimeError as error:
        return [_absent(group, variant, str(error).splitlines()[0][:200]) for variant in group.variants]


def _ran_out(cells: Sequence[dict[str, Any]]) -> bool:
    """Whether one of a group's first variants did not fit into the memory."""
    return any(OUT_OF_MEMORY in cell.get("not_measured", "") for cell in cells[:TOGETHER])


def _clean_up(device: torch.device) -> None:
    """Give back what a variant that failed, or the last group's graphs, held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_group(
    group: Group,
    device: torch.device,
    end: float,
    rate: dict[str, float],
    failed: Callable[[Variant], str | None],
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Count, weigh, and time in turns; what runs over ``end`` (of `time.perf_counter`) is given up."""
    _clean_up(device)
    work = Workload(preset(group.arch), group.batch, device)
    cells: dict[Variant, dict[str, Any]] = {}
    calls: dict[Variant, Callable[[], None]] = {}
    ahead = 0.0  # seconds that the variants accepted so far need in the rounds
    for variant in group.variants:
        start = time.perf_counter()
        if start + ahead > end:
            cells[variant] = _absent(group, variant, "the time was over")
            continue
        progress(f"  {variant}")
        try:
            backward = work.backward(variant)
            call = work.step(backward)
            flops = None
            if variant.run == "eager":
                with FlopCounterMode(display=False) as counter:
                    call()
                flops = counter.get_total_flops()
            else:
                call()
            work.optimizer.zero_grad(set_to_none=False)
            start = time.perf_counter()
            peak = None if variant.run == "graphed" else m.peak_memory(work.step(backward, keep=True), device)
            m.synchronize(device)
            took = time.perf_counter() - start
        except Exception as error:  # one variant must not cost the others their figures
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            cells[variant] = _absent(group, variant, reason[:200])
            work.optimizer.zero_grad(set_to_none=True)
            _clean_up(device)
            continue
        ahead += took * (1 + ROUNDS[0])
        if variant.run != "graphed" and calls and time.perf_counter() + ahead > end:
            ahead -= took * (1 + ROUNDS[0])
            cells[variant] = _absent(group, variant, "the time was over")
            continue
        calls[variant] = call
        cells[variant] = _named(group, variant) | {"flops": flops, "peak_bytes": peak, "state_bytes": work.state_bytes}
    if calls:
        names = {str(variant): call for variant, call in calls.items()}
        # The device's time is shared by groups: a group that is quick does not use it up on more rounds.
        left = min(end - time.perf_counter(), 2 * ahead)
        samples, reason = None, ""
        try:
            samples = m.interleaved(names, device, seconds=left, rounds=ROUNDS)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
        if samples is None:
            del names, calls, call, backward, work
            return _without_graphs(group, device, end, rate, failed, progress, reason)
        for variant in calls:
            cells[variant] |= _figures(samples, variant, group, cells, rate, failed(variant))
    work.optimizer.zero_grad(set_to_none=True)
    return list(cells.values())


def _without_graphs(
    group: Group,
    device: torch.device,
    end: float,
    rate: dict[str, float],
    failed: Callable[[Variant], str | None],
    progress: Callable[[str], None],
    reason: str,
) -> list[dict[str, Any]]:
    """A group once more: in turns its variants may need more memory, which graphs keep, than one by one."""
    lost = tuple(variant for variant in group.variants if variant.run == "graphed")
    rest = tuple(variant for variant in group.variants if variant.run != "graphed")
    cells = [_absent(group, variant, reason) for variant in (lost if rest and lost else group.variants)]
    if rest and lost:
        cells = measure_group(Group(group.arch, group.batch, rest), device, end, rate, failed, progress) + cells
    return cells


def _figures(
    samples: dict[str, list[float]],
    variant: Variant,
    group: Group,
    cells: dict[Variant, dict[str, Any]],
    rate: dict[str, float],
    failure: str | None,
) -> dict[str, Any]:
    times = samples[str(variant)]
    median = statistics.median(times)
    plain = cells.get(variant._replace(run="eager"), {})
    flops = cells[variant]["flops"] or plain.get("flops") or _same_work(cells, variant)
    found: dict[str, Any] = {
        "rounds": len(times),
        "ms": 1e3 * median,
        "iqr_ms": 1e3 * m.spread(times),
        "images_s": group.batch / median,
        "flops": flops,
        "forwards": flops and flops / (group.batch * forward_flops(preset(group.arch))),
        "utilisation": flops and flops / median / rate[variant.precision],
        "check": failure or "ok",
    }
    if failure is None:
        found["times_as_fast"] = {
            name: m.ratio(samples[str(other)], times)
            for name, other in (
                ("paper", variant.baseline),
                ("paper fp32", variant.baseline._replace(precision="fp32")),
                ("random", variant._replace(method=f"random-{variant.method.rpartition('-')[2]}")),
            )
            if str(other) in samples and other != variant
        }
    return found


def _same_work(cells: dict[Variant, dict[str, Any]], variant: Variant) -> int | None:
    """FLOPs of a variant that computes the same products at another precision."""
    for other, cell in cells.items():
        if (other.method, other.order) == (variant.method, variant.order) and cell.get("flops"):
            return cell["flops"]
    return None


def _named(group: Group, variant: Variant) -> dict[str, Any]:
    return {"arch": group.arch, "batch": group.batch} | variant._asdict()


def _absent(group: Group, variant: Variant, reason: str) -> dict[str, Any]:
    return _named(group, variant) | {"not_measured": reason}
