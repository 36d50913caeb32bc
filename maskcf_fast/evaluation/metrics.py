"""Numbers derived from counts: intervals, calibration error, effective robustness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, linear_regression

import numpy as np

from ..core.errors import UserError
from ..core.files import read_yaml

BINS = 15  # of the calibration error


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 1927), in per cent.

    It holds the true accuracy with probability ``level`` if the images are a random sample, and, unlike the normal
    approximation, stays within [0, 100] and is right near its ends. It says nothing of other training seeds.
    """
    if not 0 <= correct <= n or n < 1:
        raise UserError(f"{correct} of {n} is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def calibration_error(counts: np.ndarray, correct: np.ndarray, confidence: np.ndarray) -> float:
    """Expected calibration error (Guo et al., ICML 2017), in per cent.

    Args:
        counts: ``[bins]``, predictions whose confidence lies in each bin.
        correct: ``[bins]``, how many of them are right.
        confidence: ``[bins]``, the sum of their confidences, each in [0, 1].

    Returns:
        The mean over all predictions of their bin's |accuracy - mean confidence|.
    """
    return 100 * float(np.abs(np.asarray(correct, float) - confidence).sum() / np.sum(counts))


def logit(percent: float) -> float:
    """``log(p / (1 - p))`` of a percentage; infinite at 0 and 100."""
    p = percent / 100
    return -math.inf if p <= 0 else math.inf if p >= 1 else math.log(p / (1 - p))


@dataclass(frozen=True)
class Baseline:
    """The accuracy on a shifted test set to expect from the one in distribution: a line between their logits."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, pairs: Sequence[tuple[float, float]]) -> Baseline:
        """Least squares through (ID, OOD) accuracies, in per cent, of models without robustness interventions.

        Raises:
            ValueError: Fewer than two different ID accuracies, or one that is not between 0 and 100.
        """
        if any(not 0 < value < 100 for pair in pairs for value in pair):
            raise UserError("accuracies of a baseline must lie between 0 and 100 per cent, both excluded")
        if len({x for x, _ in pairs}) < 2:
            raise UserError(f"a line needs at least two models of different ID accuracy, got {len(pairs)} model(s)")
        return cls(*linear_regression(*zip(*(map(logit, pair) for pair in pairs), strict=True)))

    def expected(self, id_accuracy: float) -> float:
        """OOD accuracy on the line, in per cent."""
        at = logit(id_accuracy)
        value = self.intercept + (self.slope * at if self.slope else 0.0)
        return 100 / (1 + math.exp(-value)) if value > -700 else 0.0

    def effective_robustness(self, id_accuracy: float, ood_accuracy: float) -> float:
        """Points of OOD accuracy above the line (Taori et al., NeurIPS 2020)."""
        return ood_accuracy - self.expected(id_accuracy)


def read_baselines(path: Path) -> dict[str, Baseline]:
    """Baselines by the name of the shifted test set, from a YAML or JSON file.

    For each name, either ``{slope: …, intercept: …}`` of a line between logits (natural logarithm), or a list of
    ``[ID accuracy, OOD accuracy]`` in per cent, one pair per model, through which the line is fitted.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no baseline at {path}")
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} must hold a baseline for each shifted test set, by its name")
    baselines = {}
    for name, value in content.items():
        try:
            if isinstance(value, Mapping):
                baselines[str(name)] = Baseline(float(value["slope"]), float(value["intercept"]))
            else:
                baselines[str(name)] = Baseline.fit([(float(x), float(y)) for x, y in value])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: {name} must be {{slope: number, intercept: number}}, or a list of [ID, OOD] accuracies of "
                f"at least two models ({error!r})"
            ) from error
    return baselines
