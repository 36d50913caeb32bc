"""An evaluation from beginning to end: every model on every test set, keeping what is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure fine-tuned models on test sets, in and out of distribution.

    Writes results.json, table.md and tradeoff.png. Results that are already in results.json are reused, unless the
    weights, the data or what decodes it have changed; so an interrupted evaluation continues when it is started again.
    """

    run: tuple[Path, ...] = ()
    """Folder of a training run; several are compared."""
    data: tuple[str, ...] = ()
    """Test sets, [NAME=][LAYOUT:]PATH. LAYOUT is imagenet, imagenet-v2, imagenet-r,
    imagenet-a, imagenet-sketch, objectnet, folder (any classes), subset (the same, predicting among its
    own classes only) or hf (a Hugging Face data set saved to disk); found out where it can be. PATH is a folder of
    class folders or of tar shards, or a pattern DIR/{000..009}.tar. Without --data, the test sets that the first run
    was trained with."""
    id: str | None = None
    """Name of the test set in distribution; by default the one of layout imagenet, else the first."""
    wise_ft: str = ""
    """Also measure (1 - α) · initial + α · fine-tuned weights, for α from FIRST:LAST:STEP (0:1:0.1) or A,B,C."""
    model_stock: bool = False
    """Also measure the Model Stock of all runs, which started from the same weights."""
    weights: Literal["auto", "final", "best"] = "auto"
    """The model after the last epoch, or of the best one; auto is best where held-out images chose it, else final."""
    baseline: Path | None = None
    """YAML or JSON file to compute effective robustness with: for each shifted test set {slope, intercept} of a line
    between logits, or a list of [ID, OOD] accuracies of ordinary models, through which it is fitted."""
    classes: str | None = None
    """Names of the model's outputs: a file with one per line, or "imagenet". By default those of the run."""
    class_map: Path | None = None
    """YAML or JSON file that gives the model's class, or a list of them, for classes that a data set calls
    otherwise."""
    outside: Literal["error", "skip"] = "error"
    """Stop at classes that the model does not know, or leave their images out."""
    out: Path | None = None
    """Folder for the results; by default evaluation/ in the first run's."""
    batch_size: int = 64
    """Images per batch and process."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """By default the run's own."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    backend: Literal["auto", "dali", "torch"] = "auto"
    """What decodes the images; auto takes DALI where it is installed."""
    threads: int = 2
    """Decoding threads, or worker processes, per process."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at unreadable images, or leave them out and count them."""
    verify: bool = True
    """Decode every new image once before; what was found is remembered."""
    exif: bool | None = None
    """Turn images as the orientation in their EXIF or XMP data says; by default as the run did."""


class Evaluation:
    """One evaluation: every model on every test set, keeping what is done.

    Args:
        config: The settings.
        processes: The processes that share the images.

    Raises:
        ImportError, OSError, ValueError: Settings, runs or data that are missing or do not fit together.
    """

    def __init__(self, config: EvaluateConfig, processes: Processes) -> None:
        if not (folders := config.run):
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
        self.specs = choose_specs(config.data, config.id, named_test_sets(self.runs[0].config.data))
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
