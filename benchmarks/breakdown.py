"""One step phase by phase: what each takes, and how many FLOPs it counts.

The real step runs; its calls into the models, the map, autograd and the optimiser are watched from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.methods.label_map import LabelMap
from maskcf_fast.models import preset
from maskcf_fast.training.cost import complete_flop_counter, forward_flops

from . import measure as m
from .workload import Variant, Workload

PHASES = (
    *("embed", "clean forward", "map", "task backward", "teacher", "masked forward", "masked backward"),
    *("clip and optimiser", "rest"),
)
ROUNDS = (3, 15)


@contextmanager
def watched(work: Workload, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """How much ``read`` (a clock, a counter) goes on in each phase of the steps within, ``"rest"`` being all of it.

    Encoding and autograd's passes come twice in a step: of the clean images, then of the masked ones.
    """
    found = dict.fromkeys(PHASES, 0.0)
    inside = False

    def phase(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
        turns = cycle(names)

        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*args, **options)
            inside, start, name = True, read(), next(turns)
            try:
                return function(*args, **options)
            finally:
                taken = read() - start
                found[name] += taken
                found["rest"] -= taken
                inside = False

        return call

    student, teacher = work.student.backbone, work.narrow_teacher or work.teacher
    places: list[tuple[Any, str, tuple[str, ...]]] = [
        *((student, name, ("embed",)) for name in ("rows", "embed_rows")),
        (student, "encode", ("clean forward", "masked forward")),
        (work.student.head, "forward", ("clean forward",)),
        (LabelMap, "__call__", ("map",)),
        *((teacher, name, ("teacher",)) for name in ("rows", "embed_rows", "encode")),
        (torch.autograd, "backward", ("task backward", "masked backward")),
        (torch.nn.utils, "clip_grad_norm_", ("clip and optimiser",)),
        (work.optimizer, "step", ("clip and optimiser",)),
    ]
    with ExitStack() as stack:
        for where, name, phases in places:
            stack.enter_context(patch.object(where, name, phase(getattr(where, name), *phases)))
        start = read()
        yield found
        found["rest"] += read() - start


def measure(
    device: torch.device, seconds: float, arch: str, batch: int, precision: str, method: str = "object-single"
) -> dict[str, Any]:
    """Time every phase, waiting for the device before and after each, and count its FLOPs.

    Returns:
        ``phases``: name, ms, iqr_ms, flops, all per step; ``forward`` is F, of the batch; ``whole_ms`` is the step
        without waiting in between.
    """
    complete_flop_counter()
    end = time.perf_counter() + seconds
    work = Workload(preset(arch), batch, device)
    step = work.step(work.backward(Variant(method, precision=precision)))
    with (
        FlopCounterMode(display=False) as counter,
        watched(work, lambda: float(counter.get_total_flops())) as flops,
    ):
        step()  # this also warms up
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    whole: list[float] = []

    def clock() -> float:
        m.synchronize(device)
        return time.perf_counter()

    for _ in m.rounds_until(end, ROUNDS):
        with watched(work, clock) as found:
            step()
        for name, taken in found.items():
            times[name].append(taken)
        whole.append(m.timed(step, device))
    where = {"arch": arch, "batch": batch, "method": method, "precision": precision}
    totals = {"forward": batch * forward_flops(work.config), "whole_ms": m.summary(whole)["ms"]}
    rows = [{"name": name, "flops": int(flops[name])} | m.summary(times[name]) for name in PHASES]
    return where | totals | {"phases": rows}
