"""A GPU's plan on any machine, with tiny models, few images and few rounds: no path is taken for the first time there.

On a CPU, what only a GPU has is stood in for: a graph's replay runs the function that it would have captured, and the
compiler stops before it makes code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from maskcf_fast.training import speed

from . import breakdown, ops, roofline, step, tune
from . import measure as m

ARCH, BATCH = "tiny", 4
SERIES = (ARCH, 2, {"tokens": (32, 64), "batch": (2, 4), "depth": (2, 4)})


def groups() -> tuple[step.Group, ...]:
    """Every variant of a GPU's plan, those of each model and size once."""
    plans = {frozenset(group.variants): group for group in step.plan("cuda")}
    return tuple(step.Group(ARCH, BATCH, group.variants) for group in plans.values())


class StandIn:
    """`speed.Graphed`'s protocol without a GPU: the same tensors hold every result, once it is captured."""

    WARM_UP = speed.Graphed.WARM_UP

    def __init__(self, function: Callable[[], Any], generator: torch.Generator) -> None:
        self.function = function
        self.calls = 0
        self.graph: object | None = None

    def __call__(self) -> Any:
        self.calls += 1
        new = self.function()
        if self.calls <= self.WARM_UP:
            return new
        if self.graph is None:
            self.out, self.graph = new, self
        for kept, value in zip(self.out, new, strict=True):
            if kept is not None:
                kept.copy_(value)
        return self.out


@contextmanager
def rehearsal() -> Iterator[None]:
    """Within, benchmarks take few rounds of short samples."""
    places: list[tuple[Any, str, Any]] = [
        *((module, "ROUNDS", (1, 1)) for module in (breakdown, ops, roofline, step, tune)),
        (step, "MATRIX", dict.fromkeys(step.MATRIX, 64)),
        (m, "SAMPLE_SECONDS", dict.fromkeys(m.SAMPLE_SECONDS, 1e-4)),
        (torch, "compile", partial(torch.compile, backend="aot_eager")),
    ]
    if not torch.cuda.is_available():
        places += [(speed, "Graphed", StandIn), (speed, "why_no_graph", lambda *_: None)]
    with ExitStack() as stack:
        for where, name, value in places:
            stack.enter_context(patch.object(where, name, value))
        yield
