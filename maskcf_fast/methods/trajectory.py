"""Running averages of a model over its own training: a teacher that follows the student, or what is kept of it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..models.adapters import merged_state

Average = float | Literal["beta"]
"""A decay, 0 for none, or "beta"; see `RunningAverage`."""


class RunningAverage:
    """A model that is moved after another one, from the same start: the average of where that has been.

    A number is the decay of an exponential moving average, ``θ ← decay · θ + (1 - decay) · student`` (Tarvainen,
    Valpola, "Mean teachers are better role models", NeurIPS 2017). ``"beta"`` weighs the model after step t of T, the
    initial one being t = 0, by the density of Beta(1/2, 1/2) at ``(t + 1/2) / (T + 1)``: the start and the end most
    (Shu et al., "CLIPood", ICML 2023). As the teacher it is that of TRACER (Asadollahzadeh et al., ICML 2026), which
    does not catch up with the student as an exponential average does.

    Args:
        target: What is moved. Its tensors are those of ``source`` by name.
        source: What it follows.
        weights: The decay, or "beta".
        total_steps: Length of the training, T.
    """

    def __init__(self, target: nn.Module, source: nn.Module, weights: Average, total_steps: int) -> None:
        self.target, self.source, self.weights, self.total_steps = target, source, weights, total_steps
        self._counted, self._sum = 0, 0.0  # the densities of so many models, from the initial one

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model after ``step``, from 1 to the last. Parameters may be divided among processes (FSDP)."""
        # Asked for anew each time: FSDP exchanges its tensors, and adapters have to be merged.
        old, new = self.target.state_dict(), merged_state(self.source)
        names = [name for name, tensor in old.items() if tensor.is_floating_point()]  # not a BatchNorm's counter
        ours, theirs = ([_local(state[name]) for name in names] for state in (old, new))
        torch._foreach_lerp_(ours, theirs, self._rate(step))

    def _rate(self, step: int) -> float:
        """How far to go to the model after this step."""
        if self.weights != "beta":
            return 1 - self.weights
        for t in range(self._counted, step + 1):  # all of them where a run is continued
            self._sum += self._density(t)
        self._counted = step + 1
        return self._density(step) / self._sum

    def _density(self, t: int) -> float:
        return 1 / math.sqrt((t + 0.5) * (self.total_steps + 0.5 - t))


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_average(name: str, weights: Average) -> None:
    """Raise a `UserError` unless it is a decay or "beta"."""
    if weights != "beta" and not 0 <= weights < 1:
        raise UserError(f'{name} must lie in [0, 1), or be "beta", got {weights}')
