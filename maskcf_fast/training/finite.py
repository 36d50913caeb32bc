"""Steps whose loss or gradient is NaN or infinite: found without waiting for the device, with the images they took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.processes import Processes

NOT_FINITE = "not_finite.jsonl"


class FiniteWatch:
    """Remembers of each step whether it was finite, and its images, until `check` asks.

    Args:
        folder: Of the run; bad steps and their images are added to ``not_finite.jsonl`` there.
        paths: Of the training images.
        processes: Those of the run.
    """

    def __init__(self, folder: Path, paths: Sequence[str], processes: Processes) -> None:
        self.folder, self.paths, self.processes = folder, paths, processes
        self._steps: list[tuple[int, list[Tensor], Tensor]] = []

    def add(self, step: int, indices: list[Tensor], value: Tensor) -> None:
        """Step number ``step`` took these images and came to ``value``, a scalar on the device."""
        self._steps.append((step, indices, ~value.isfinite()))

    def check(self) -> list[int]:
        """The steps since the last call that were not finite in some process; all processes call this alike."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        bad = self.processes.sum(torch.stack([flag for *_, flag in steps]).int()).tolist()
        found = [step for step, count in zip(steps, bad, strict=True) if count]
        for step, indices, _ in found:
            self.record(step, indices)
        return [step for step, *_ in found]

    def record(self, step: int, indices: list[Tensor]) -> None:
        """Write down a bad step; all processes call this alike."""
        mine = [self.paths[i] for i in torch.cat(indices).tolist()]
        files = [path for part in self.processes.gather(mine) for path in part]
        if self.processes.main:
            with (self.folder / NOT_FINITE).open("a") as file:
                file.write(json.dumps({"step": step, "images": files}) + "\n")
