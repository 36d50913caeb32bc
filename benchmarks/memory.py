"""Peak memory of one step, without timing it: what a large model needs on a machine where a round takes minutes."""

from __future__ import annotations

from typing import Any

import torch

from maskcf_fast.models import preset

from .workload import Variant, Workload

REPEATS = 2
ORDERS = ("paper", "one graph", "two passes")


def measure(device: torch.device, arch: str, batch: int, precision: str) -> dict[str, Any]:
    """Bytes above weights, gradients and moments at the highest point of a step.

    Returns:
        ``steps``: ``name`` and ``peak_bytes``, by way to compute the step, the paper's order first; each the least of
        some steps, since on a CPU the system may take pages of libraries back and count them again when they are used.
        None where the system does not say.
    """
    work = Workload(preset(arch), batch, device)
    steps = []
    for order in ORDERS:
        variant = Variant("object-single", order, precision=precision)
        steps.append({"name": str(variant), "peak_bytes": least(work, variant)})
    work.student.transformer.recompute = "gelu"
    steps.append({"name": f"{variant}, GELU recomputed", "peak_bytes": least(work, variant)})
    return {"arch": arch, "batch": batch, "precision": precision, "steps": steps}


def least(work: Workload, variant: Variant) -> int | None:
    """The least peak of some steps."""
    backward = work.backward(variant)
    peaks = [work.peak_memory(backward) for _ in range(REPEATS)]
    return None if None in peaks else min(p for p in peaks if p is not None)


def shares(section: dict[str, Any]) -> dict[str, float]:
    """What each way to compute the step takes of the paper order's memory, where both are known."""
    peaks = {step["name"]: step["peak_bytes"] for step in section["steps"]}
    paper = next(iter(peaks.values()))
    return {name: peak / paper for name, peak in peaks.items() if peak and paper}
