"""An evaluation from beginning to end: every model on every test set, keeping what is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..core.errors import UserError
from ..core.files import atomic_write
from ..core.processes import Processes
from ..evaluation.benchmark import Reader, read_class_map
from ..evaluation.metrics import read_baselines
from ..evaluation.report import Report, Row
from ..evaluation.results import Results
from ..evaluation.suite import Suite, check_known, choose_specs
from ..training.build import named_test_sets
from ..training.runs import Run, parse_alphas, read_run, stock
from .evaluate_settings import EvaluateConfig, flat


class Evaluation:
    """One evaluation: every model on every test set, keeping what is done.

    Args:
        config: The settings.
        processes: The processes that share the images.

    Raises:
        ImportError, OSError, ValueError: Settings, runs or data that are missing or do not fit together.
    """

    def __init__(self, config: EvaluateConfig, processes: Processes) -> None:
        if not (folders := flat(config.run)):
            raise UserError("--run DIR is missing: the folder of a training run")
        self.config, self.processes = config, processes
        self.alphas = parse_alphas(config.wise_ft)
        if config.model_stock and len(folders) < 2:
            raise UserError("--model-stock needs at least two runs of --run, got one")
        self.baselines = read_baselines(config.baseline) if config.baseline else {}
        names = _distinct_names(folders)
        self.runs = [
            read_run(folder, config.weights, config.classes, name) for folder, name in zip(folders, names, strict=True)
        ]
        self.specs = choose_specs(flat(config.data), config.id, named_test_sets(self.runs[0].config.data))
        if not self.specs:
            raise UserError(f"--data is missing, and {folders[0]} was trained without test sets")
        self.folder = config.out or folders[0] / "evaluation"
        self.results = Results(self.folder / "results.json", "evaluate", writes=processes.main)
        self._suites: dict[tuple[tuple[str, ...], bool], Suite] = {}

    def run(self) -> Report:
        """Measure what is missing, and write the results."""
        # All test sets before the first measurement: what is wrong with the last should not show hours later.
        first, *_ = [self.suite(run) for run in self.runs]
        if self.baselines and not set(self.baselines) & set(first.shifted):
            names = [benchmark.name for benchmark in first.benchmarks]
            check_known(f"--baseline {self.config.baseline}", list(self.baselines), names)
        first.describe()
        rows = [row for run in self.runs for row in self._rows(run)]
        if self.config.model_stock:
            name, precision = "model stock", self.config.precision or self.runs[0].config.precision
            rows.append(Row(name, None, first.measure(stock(self.runs), precision, name, model=name)))
        report = Report(rows, first.benchmarks, first.id, self.baselines)
        self._write(report, first)
        return report

    def suite(self, run: Run) -> Suite:
        """The test sets for the classes of a run; read once for all runs with the same."""
        config = self.config
        upright = run.config.data.exif if config.exif is None else config.exif
        key = run.classes, upright
        if key not in self._suites:
            class_map = read_class_map(config.class_map) if config.class_map else None
            reader = Reader(
                run.classes, class_map, config.outside, config.on_bad_image, config.verify, self.processes.main, upright
            )
            self._suites[key] = Suite(
                self.specs,
                reader,
                self.results,
                self.processes,
                id=config.id,
                batch_size=config.batch_size,
                threads=config.threads,
                backend=config.backend,
            )
        return self._suites[key]

    def _rows(self, run: Run) -> Iterator[Row]:
        precision = self.config.precision or run.config.precision
        for alpha, model in run.models(self.alphas):
            title = run.name if alpha is None else f"{run.name} α {alpha:g}"
            yield Row(run.name, alpha, self.suite(run).measure(model, precision, title, model=run.name, alpha=alpha))

    def _write(self, report: Report, suite: Suite) -> None:
        if not self.processes.main:
            return
        self.results.write({"id": report.id, "data": suite.summary(), "rows": report.summary()})
        table = report.markdown()
        atomic_write(self.folder / "table.md", (table + "\n").encode())
        drawn = report.plot(self.folder / "tradeoff.png")
        print(f"\n{table}\n\nresults.json, table.md{', tradeoff.png' if drawn else ''}: {self.folder}")


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError(f"--run names a folder twice: {', '.join(map(str, folders))}")
    depth = 1
    while len(names := {"/".join(path.parts[-depth:]) for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths] if names else []
