"""Tables and the picture of an evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..visualization.plots import WISE, Point, plot_tradeoff
from .benchmark import Benchmark
from .measure import Measurement
from .metrics import Baseline


@dataclass(frozen=True)
class Row:
    """The results of one model: a run's own, or one of its WiSE-FT models (``alpha``); by the data set's name."""

    model: str
    alpha: float | None
    results: Mapping[str, Measurement]


@dataclass(frozen=True)
class Report:
    """An evaluation of some models on some data sets.

    Attributes:
        rows: The models.
        benchmarks: The data sets.
        id: Name of the data set in distribution; all others are shifted.
        baselines: What to expect on the shifted ones; may be fewer.
    """

    rows: Sequence[Row]
    benchmarks: Sequence[Benchmark]
    id: str
    baselines: Mapping[str, Baseline]

    @property
    def shifted(self) -> list[str]:
        """Names of the data sets out of distribution."""
        return [b.name for b in self.benchmarks if b.name != self.id]

    def average(self, row: Row) -> float | None:
        """Mean top-1 accuracy over the shifted data sets, each counting the same, as in the paper."""
        return statistics.mean(row.results[name].top1 for name in self.shifted) if self.shifted else None

    def above_initial(self, row: Row) -> float | None:
        """Points of OOD accuracy gained on the model that fine-tuning started from, where that was measured.

        Taori et al. (NeurIPS 2020) call it relative robustness.
        """
        start = next((other for other in self.rows if other.model == row.model and other.alpha == 0), None)
        here, there = self.average(row), None if start is None else self.average(start)
        return None if here is None or there is None else here - there

    def effective_robustness(self, row: Row) -> dict[str, float]:
        """Points above the baseline, for each shifted data set that has one."""
        at = row.results[self.id].top1
        return {
            name: self.baselines[name].effective_robustness(at, row.results[name].top1)
            for name in self.shifted
            if name in self.baselines
        }

    def summary(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [
            {
                "model": row.model,
                "alpha": row.alpha,
                "top1": {name: result.top1 for name, result in row.results.items()},
                "ood_average": self.average(row),
                "ood_above_initial": self.above_initial(row),
                "effective_robustness": self.effective_robustness(row),
            }
            for row in self.rows
        ]

    def markdown(self) -> str:
        """A table of accuracies, one of everything else, and what to know about them."""
        interpolated = any(row.alpha is not None for row in self.rows)
        columns = ["model", *(["α"] if interpolated else []), f"{self.id} (ID)", *self.shifted]
        extra = ["OOD average"] if self.shifted else []
        extra += ["OOD − initial"] if any(self.above_initial(row) is not None for row in self.rows) else []
        extra += ["effective robustness"] if self.effective_robustness(self.rows[0]) else []
        lines = []
        for row in self.rows:
            cells = [row.model, *([_alpha(row)] if interpolated else [])]
            cells += [f"{row.results[name].top1:.2f}" for name in (self.id, *self.shifted)]
            robust = self.effective_robustness(row)
            values = {
                "OOD average": (self.average(row), ""),
                "OOD − initial": (self.above_initial(row), "+"),
                "effective robustness": (statistics.mean(robust.values()) if robust else None, "+"),
            }
            for name in extra:
                value, sign = values[name]
                cells.append("" if value is None else f"{value:{sign}.2f}")
            lines.append(cells)
        return "\n\n".join(
            [markdown_table([*columns, *extra], lines), self._details(interpolated), "\n".join(self._notes())]
        )

    def _details(self, interpolated: bool) -> str:
        robust = bool(self.effective_robustness(self.rows[0]))
        columns = ["model", *(["α"] if interpolated else []), "data", "images", "classes", "top-1", "95 % interval"]
        columns += ["top-5", "ECE", *(["effective robustness"] if robust else [])]
        lines = []
        for row in self.rows:
            above = self.effective_robustness(row)
            for benchmark in self.benchmarks:
                result = row.results[benchmark.name]
                cells = [row.model, *([_alpha(row)] if interpolated else []), benchmark.name]
                cells += [f"{result.images:,}", f"{len(result.per_class):,}", f"{result.top1:.2f}"]
                cells += [f"{result.low:.2f} – {result.high:.2f}", "" if result.top5 is None else f"{result.top5:.2f}"]
                cells += [f"{result.ece:.2f}"]
                if robust:
                    cells.append(f"{above[benchmark.name]:+.2f}" if benchmark.name in above else "")
                lines.append(cells)
        return markdown_table(columns, lines)

    def _notes(self) -> list[str]:
        notes = [
            "Top-1, top-5 and ECE (expected calibration error, 15 bins) in per cent. Intervals are Wilson's, for the "
            "draw of the images, not of the training seed."
        ]
        if restricted := [b for b in self.benchmarks if b.restricted]:
            listed = ", ".join(f"{b.name} ({int(b.allowed.sum()):,} outputs)" for b in restricted)
            notes.append(f"Predictions are chosen from the data set's own classes only: {listed}.")
        if self.effective_robustness(self.rows[0]):
            without = [name for name in self.shifted if name not in self.baselines]
            notes.append(
                f"Effective robustness: points above the baseline's line at the model's accuracy on {self.id}"
                + (f"; no baseline for {', '.join(without)}." if without else ".")
            )
        notes += [note for benchmark in self.benchmarks for note in benchmark.notes]
        return [f"- {' '.join(note.split())}" for note in notes]

    def plot(self, path: Path) -> bool:
        """Draw ID against mean OOD accuracy, with the WiSE-FT curves; False where there is nothing to compare."""
        if not self.shifted:
            return False
        curves: dict[str, list[Point]] = {}
        several = len({row.model for row in self.rows}) > 1
        for row in self.rows:
            name = row.model
            if row.alpha is not None:
                name = f"{WISE} {row.model}" if several else WISE
            average = self.average(row)
            assert average is not None
            curves.setdefault(name, []).append(Point(_alpha(row), [row.results[self.id].top1], [average]))
        shifted = self.shifted[0] if len(self.shifted) == 1 else f"the mean of {len(self.shifted)} shifted test sets"
        plot_tradeoff(path, curves, f"{self.id} against {shifted}")
        return True


def _alpha(row: Row) -> str:
    return "" if row.alpha is None else f"{row.alpha:g}"


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text, the others figures."""
    return "\n".join([table_line(columns), "|---|" + "--:|" * (len(columns) - 1), *map(table_line, lines)])


def table_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table; bars and line breaks of a name must not end a cell or the table."""
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
