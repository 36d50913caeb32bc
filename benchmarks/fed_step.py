"""How much slower a step is when the loader feeds it than on a batch that is already there."""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from maskcf_fast.models import preset

from . import measure as m
from .workload import Variant, Workload

ROUNDS = (3, 9)
STEPS = {"cpu": 3, "cuda": 16}  # per turn; a GPU's are short, and a turn's first waits for its images


def measure(
    device: torch.device, seconds: float, images: Path | None, arch: str, batch: int, threads: int
) -> dict[str, Any]:
    """Some steps fed by the loader, in turns with as many on one batch that is there.

    Returns:
        ``fed_ms`` and ``synthetic_ms`` per step, ``slowdown`` (median over the rounds of their ratio, minus 1), or
        ``not_measured``.
    """
    try:
        from maskcf_fast.data import LoaderConfig, build_loader, scan_images

        from .loader import write_photographs

        with tempfile.TemporaryDirectory() as folder:
            if images is None:
                images = Path(folder)
                write_photographs(images, STEPS[device.type] * batch)
            config = preset(arch)
            settings = LoaderConfig(batch, config.image_size, train=True, threads=threads, device=str(device))
            loader = build_loader(scan_images(images), settings)
            return _measure(loader, Workload(config, batch, device), seconds)
    except ImportError as error:
        return {"not_measured": f"not available: {error}"}


def _measure(loader: Any, work: Workload, seconds: float) -> dict[str, Any]:
    precision = "bf16" if work.device.type == "cuda" else "fp32"
    method = work.method(Variant("object-single", precision=precision))
    batch = [work.images, work.labels]
    step = work.step(lambda: method.backward(*batch, generator=work.generator))
    fed: list[float] = []
    synthetic: list[float] = []
    end = time.perf_counter() + seconds

    steps = min(STEPS[work.device.type], len(loader))

    def feed() -> None:
        for images, labels, _ in islice(loader, steps):
            batch[:] = images.to(work.device, non_blocking=True), labels.to(work.device, non_blocking=True)
            step()

    feed()  # workers start, kernels are tuned
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() > end:
            break
        fed.append(m.timed(feed, work.device) / steps)
        batch[:] = work.images, work.labels
        synthetic.append(m.timed(step, work.device, steps))
    return {
        "batch": work.batch,
        "steps": steps,
        "fed_ms": 1e3 * statistics.median(fed),
        "synthetic_ms": 1e3 * statistics.median(synthetic),
        "slowdown": m.ratio(fed, synthetic) - 1,
    }
