"""Models made of trained ones without training: averages of weights, and of outputs.

Integers in a state, the batches that a BatchNorm has counted, stay those of the first model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.errors import UserError

State = Mapping[str, Tensor]


def interpolate(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """``(1 - alpha) * start + alpha * end``: WiSE-FT between the zero-shot and the fine-tuned model.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.

    Raises:
        ValueError: The states differ in their names or shapes.
    """
    _same_shapes([start, end])
    return {name: torch.lerp(x, end[name], alpha) if x.is_floating_point() else x for name, x in start.items()}


def average(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of several models' weights: a uniform soup of runs that started from the same weights.

    Source: Wortsman et al., "Model soups", ICML 2022.

    Raises:
        ValueError: No state, or states that differ in their names or shapes.
    """
    if not states:
        raise UserError("an average needs at least one model, got none")
    _same_shapes(states)
    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if first.is_floating_point() else first
        for name, first in states[0].items()
    }


def model_stock(start: State, states: Sequence[State]) -> dict[str, Tensor]:
    """Fine-tuned models merged tensor by tensor: ``t · mean + (1 - t) · start``, with less t where they agree less.

    Of k models whose ways from the start have the angle θ, ``t = k cos θ / ((k - 1) cos θ + 1)``: then the result is
    the point nearest to the centre that they lie around. The cosine is the mean over the pairs, a negative one counts
    as 0, and a tensor that has not moved stays.

    Source: Jang, Yun, Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024.

    Raises:
        ValueError: Fewer than two models, or states that differ in their names or shapes.
    """
    if (k := len(states)) < 2:
        raise UserError(f"a model stock needs at least two fine-tuned models, got {k}")
    _same_shapes([start, *states])
    merged = {}
    for name, origin in start.items():
        if not origin.is_floating_point():
            merged[name] = origin
            continue
        ways = torch.stack([state[name] - origin for state in states]).flatten(1).double()
        total = torch.nn.functional.normalize(ways, dim=1).sum(dim=0)
        cos = float((total @ total - k) / (k * (k - 1)))
        t = k * cos / ((k - 1) * cos + 1) if cos > 0 else 0.0
        merged[name] = origin + (t * ways.mean(dim=0)).to(origin.dtype).view_as(origin)
    return merged


class OutputEnsemble(nn.Module):
    """The mean of the class probabilities of several models, as log-probabilities.

    Source: the output-space ensemble that Wortsman et al. (CVPR 2022) hold against WiSE-FT.

    Args:
        models: Each maps images to logits ``[N, classes]``.

    Raises:
        ValueError: No model.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise UserError("an ensemble needs at least one model, got none")
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Images to float32 log-probabilities ``[N, classes]``."""
        each = torch.stack([model(images).float().log_softmax(dim=-1) for model in self.models])
        return each.logsumexp(dim=0) - torch.log(torch.tensor(float(len(self.models)), device=each.device))


def _same_shapes(states: Sequence[State]) -> None:
    first = {name: tensor.shape for name, tensor in states[0].items()}
    for state in states[1:]:
        other = {name: tensor.shape for name, tensor in state.items()}
        if bad := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            raise UserError(f"models of different architectures cannot be averaged: they differ in {bad[0]}")
