"""From result files to figures: accuracy by group, the frontier, and methods against FD at equal ID accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .data import TESTS

USUAL = 0.95  # share of the usual backgrounds in distribution
START, TUNED, REFERENCE = "zero-shot", "ft", "fd"
SHIFTED = ("swapped", "balanced", "opposite", "worst")  # what methods are compared in, at equal ID accuracy


@dataclass(frozen=True)
class Model:
    """One model of one seed; accuracies in per cent.

    Attributes:
        method: Its name without weight or α.
        strength: Weight of the distillation loss, or WiSE-FT's α; None where there is none.
        seed: Of the images and the run.
        id: On new objects on photographs known from training, 95 % of them on usual backgrounds as there.
        swapped: On known photographs, other classes' only.
        balanced: On new photographs, every kind as often.
        opposite: On new photographs, other classes' only.
        worst: On new photographs, of the worst of the groups: class by usual or other background.
        val: On the validation images, which are as the training images are.
        val_images: How many these are.
    """

    method: str
    strength: float | None
    seed: int
    id: float
    swapped: float
    balanced: float
    opposite: float
    worst: float
    val: float
    val_images: int

    @property
    def name(self) -> str:
        """Method and strength."""
        if self.strength is None:
            return self.method
        return f"{self.method}{' α' if self.method == 'wise-ft' else ''} {self.strength:g}"


def models(files: Iterable[dict[str, Any]]) -> list[Model]:
    """The models in result files. Every class counts the same."""
    found = []
    for file in files:
        for row in file["rows"]:
            name = file["row"] if file["row"] == "ft-balanced" else row["method"]
            method, _, strength = name.partition(" ")
            shares = {data: [right / n for n, right in row["per_class"][data].values()] for data in TESTS}
            usual, swapped, new_usual, opposite = (100 * statistics.mean(shares[data]) for data in TESTS)
            classes = len(shares["new-usual"])
            found.append(
                Model(
                    method,
                    float(strength.removeprefix("α ")) if strength else None,
                    file["seed"],
                    USUAL * usual + (1 - USUAL) * swapped,
                    swapped,
                    new_usual / classes + opposite * (classes - 1) / classes,
                    opposite,
                    100 * min(shares["new-usual"] + shares["new-other"]),
                    row["accuracy"]["val"],
                    sum(n for n, _ in row["per_class"]["val"].values()),
                )
            )
    return found


def grouped(found: Sequence[Model]) -> dict[str, list[Model]]:
    """Models that differ in the seed only, by name."""
    groups: dict[str, list[Model]] = {}
    for model in sorted(found, key=lambda m: (m.method, m.strength or 0, m.seed)):
        groups.setdefault(model.name, []).append(model)
    return groups


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval; without one for a single seed."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + (
            f" [{self.mean - self.half:+.1f}, {self.mean + self.half:+.1f}]" if self.n > 1 else ""
        )


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of a mean; the half width of one value is NaN."""
    from scipy.stats import t

    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(statistics.mean(values), half, n)


def at_equal_id(found: Sequence[Model], model: Model, measure: str) -> float | None:
    """What FD comes to at the model's ID accuracy: on the same seed's line through the start, FD's weights and FT.

    Points of the same ID accuracy count as their mean. One of FD's weights is held against the others: what comes out
    is what a method comes to that is no better than FD. None where the seed lacks one of the three, or where the model
    lies outside the line's ends: nothing is extrapolated.
    """
    same = [m for m in found if m.seed == model.seed and m.method in (START, TUNED, REFERENCE) and m != model]
    if {m.method for m in same} != {START, TUNED, REFERENCE}:
        return None
    ids = sorted({m.id for m in same})
    if not ids[0] <= model.id <= ids[-1]:
        return None
    values = [statistics.mean(getattr(m, measure) for m in same if m.id == x) for x in ids]
    return float(np.interp(model.id, ids, values))


def advantages(found: Sequence[Model], chosen: Callable[[Model], bool], measure: str) -> list[float]:
    """For each seed, how far models lie above FD at equal ID accuracy; several of a seed count as their mean."""
    by_seed: dict[int, list[float]] = {}
    for model in filter(chosen, found):
        reference = at_equal_id(found, model, measure)
        if reference is not None:
            by_seed.setdefault(model.seed, []).append(getattr(model, measure) - reference)
    return [statistics.mean(values) for _, values in sorted(by_seed.items())]


def choose(found: Sequence[Model], method: str) -> list[Model]:
    """For each seed, the model of a method that validation chooses, which sees the training distribution alone.

    The one-standard-error rule (Breiman et al., 1984): of the weights whose validation accuracy lies within one
    standard error of the best's, FT's among them, the largest. For WiSE-FT it is the smallest α.
    """
    chosen = []
    for seed in sorted({m.seed for m in found if m.method == method}):
        own = [m for m in found if m.seed == seed and m.method == method]
        best = max(m.val for m in found if m.seed == seed and m.method in (method, TUNED))
        error = 100 * math.sqrt(best / 100 * (1 - best / 100) / own[0].val_images)
        near = [m for m in own if m.val >= best - error] or [max(own, key=lambda m: m.val)]
        sign = -1 if method == "wise-ft" else 1
        chosen.append(max(near, key=lambda m: sign * (m.strength or 0)))
    return chosen


def paired(first: Sequence[Model], second: Sequence[Model], measure: str) -> list[float]:
    """First less second, in the seeds that both have."""
    others = {m.seed: m for m in second}
    return [getattr(m, measure) - getattr(others[m.seed], measure) for m in first if m.seed in others]
