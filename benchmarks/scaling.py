"""How time and memory of a step grow with the batch, the tokens, the depth and the processes."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from maskcf_fast.core.processes import Processes
from maskcf_fast.models import VisionTransformerConfig, preset
from maskcf_fast.training.distributed import average_gradients, broadcast_state

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
    try:
        found["ranks"] = _ranks(preset(arch), batch, precision, device, progress)
    except Exception as error:  # of a process of its own
        found["ranks"] = {"not_measured": str(error).strip().splitlines()[-1]}
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
        calls[name] = work.step(backward)
        calls[name]()
        work.optimizer.zero_grad(set_to_none=False)
        found[f"{name}_bytes"] = m.peak_memory(work.step(backward, keep=True), device)
    samples = m.interleaved(calls, device, seconds=0, rounds=ROUNDS)
    return found | {f"{name}_ms": 1e3 * statistics.median(times) for name, times in samples.items()}


def _ranks(
    config: VisionTransformerConfig, batch: int, precision: str, device: torch.device, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Images per second of one and of two processes, each with a batch, and a GPU or a core, of its own."""
    there = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    if there < 2:
        return {"not_measured": "needs two GPUs or cores: two processes on one would share it"}
    progress("scaling: 2 processes")
    points = []
    for ranks in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = torch.multiprocessing.get_context("spawn").Queue()
        arguments = (ranks, port, config, batch, precision, device.type, queue)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=ranks)
        points.append({"x": ranks, "images_s": queue.get()})
    return {"points": points, "efficiency": points[1]["images_s"] / 2 / points[0]["images_s"]}


def _rank(
    rank: int,
    ranks: int,
    port: int,
    config: VisionTransformerConfig,
    batch: int,
    precision: str,
    kind: str,
    queue: Any,
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(ranks)
    torch.set_num_threads(1)
    processes = Processes.start(kind)
    device = processes.device
    work = Workload(config, batch, device)
    method = work.method(Variant(METHOD, precision=precision))
    broadcast_state(method, processes)

    def backward() -> Any:
        out = method.backward(work.images, work.labels, generator=work.generator)
        average_gradients(method.parameters(), processes)
        return out

    step = work.step(backward)
    warm, timed = (3, 20) if kind == "cuda" else (1, 4)
    for _ in range(warm):
        step()
    seconds = m.timed(step, device, repeats=timed)
    if rank == 0:
        queue.put(ranks * batch / seconds)
    processes.stop()
