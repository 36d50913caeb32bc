"""How time and memory of a step grow with the batch, the tokens and the depth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from maskcf_fast.models import VisionTransformerConfig, preset

from . import measure as m
from .workload import Variant, Workload

METHOD = "object-single"
Series = tuple[str, int, Mapping[str, Sequence[int]]]
SERIES: dict[str, Series] = {  # by kind of device: model, batch, and the values of each series
    "cpu": ("ViT-B/32", 4, {"batch": (2, 4, 8, 16), "tokens": (224, 320, 448, 640), "depth": (3, 6, 12)}),
    "cuda": ("ViT-B/16", 64, {"batch": (16, 32, 64), "tokens": (160, 224, 320), "depth": (3, 6, 12)}),
}
ROUNDS = (3, 7)
GROWTH = 2.5  # a guess at the next point's time from the last's


def measure(
    device: torch.device,
    seconds: float,
    series: Series | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure each series for the step and for the paper's order, and fit exponents.

    Args:
        device: Where.
        seconds: Time to spend, shared by the series; the largest values that do not fit are left out, by name.
        series: Model, batch, and values by series; tokens are given as image sizes, with half the depth.
        progress: Called with a line per point.

    Returns:
        By series, ``points`` and ``exponents`` (least squares on logarithms) of time and memory by order.
    """
    arch, batch, values = series or SERIES[device.type]
    precision = "bf16" if device.type == "cuda" else "fp32"
    found: dict[str, Any] = {"arch": arch, "images": batch, "precision": precision, "method": METHOD}
    end = time.perf_counter() + seconds
    for i, (name, sizes) in enumerate(values.items()):
        until = time.perf_counter() + (end - time.perf_counter()) / (len(values) - i)
        points: list[dict[str, Any]] = []
        last = 0.0
        for size in sizes:
            config = preset(arch)
            if name == "depth":
                config = replace(config, depth=size)
            elif name == "tokens":
                config = replace(config, image_size=size, depth=max(config.depth // 2, 1))
            x = 1 + config.num_patches if name == "tokens" else size
            if points and time.perf_counter() + GROWTH * last > until:
                points.append({"x": x, "not_measured": f"about {GROWTH * last:.0f} s, which is over the time"})
                continue
            progress(f"scaling: {name} {x}")
            start = time.perf_counter()
            try:
                points.append({"x": x} | _point(config, size if name == "batch" else batch, precision, device))
            except RuntimeError as error:
                points.append({"x": x, "not_measured": m.first_line(error)})
            last = time.perf_counter() - start
        found[name] = {"points": points, "exponents": exponents(points)}
    return found


def exponents(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Exponent of each measured quantity in x; None with fewer than two points."""
    names = [key for key in (points[0] if points else {}) if key not in ("x", "not_measured")]
    return {key: fit([(p["x"], p[key]) for p in points if p.get(key)]) for key in names}


def fit(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Slope of log y over log x by least squares."""
    if len({x for x, _ in pairs}) < 2:
        return None
    xs, ys = ([math.log(value) for value in column] for column in zip(*pairs, strict=True))
    return statistics.linear_regression(xs, ys).slope


def _point(config: VisionTransformerConfig, batch: int, precision: str, device: torch.device) -> dict[str, Any]:
    work = Workload(config, batch, device)
    found: dict[str, Any] = {}
    calls = {}
    for name, order in (("step", "two passes"), ("paper", "paper")):
        backward = work.backward(Variant(METHOD, order, precision=precision))
        found[f"{name}_bytes"] = work.peak_memory(backward)
        calls[name] = work.step(backward)
    samples = m.interleaved(calls, device, seconds=0, rounds=ROUNDS)
    return found | {f"{name}_ms": 1e3 * statistics.median(times) for name, times in samples.items()}
