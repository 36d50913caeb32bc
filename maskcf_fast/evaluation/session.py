"""An evaluation from beginning to end: every model on every test set, keeping what is done."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .._cache import atomic_write
from ..data import Batch, LoaderConfig, build_loader
from ..models import ImageClassifier
from ..training.checkpoint import fingerprint
from ..training.distributed import Processes
from .benchmark import Benchmark, Reader, read_class_map
from .classes import some
from .config import EvaluateConfig, flat
from .disk import DiskImages, DiskLoader
from .layouts import Spec, read_benchmark
from .measure import Measurement, measure
from .metrics import read_baselines
from .report import Report, Row
from .results import Results
from .runs import Run, parse_alphas, read_run


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
            raise ValueError("--run DIR is missing: the folder of a training run")
        self.config, self.processes = config, processes
        self.alphas = parse_alphas(config.wise_ft)
        self.baselines = read_baselines(config.baseline) if config.baseline else {}
        names = _distinct_names(folders)
        self.runs = [
            read_run(folder, config.weights, config.classes, name) for folder, name in zip(folders, names, strict=True)
        ]
        self.specs = [Spec.parse(text) for text in flat(config.data)] or _own_test_sets(self.runs[0])
        taken = [spec.name for spec in self.specs]
        if twice := sorted({name for name in taken if taken.count(name) > 1}):
            raise ValueError(f"several test sets are called {some(twice)}: name them, --data NAME=PATH")
        if config.id is not None:
            _check_known("--id", [config.id], taken)
        self.folder = config.out or folders[0] / "evaluation"
        self.results = Results(self.folder / "results.json", writes=processes.main)
        self._benchmarks: dict[tuple[str, ...], list[Benchmark]] = {}

    def run(self) -> Report:
        """Measure what is missing, and write the results."""
        if not self.processes.main:
            self.processes.barrier()
        # Before the first measurement: what is wrong with the last data set should not show hours later.
        for run in self.runs:
            self.benchmarks(run)
        if self.processes.main:
            self.processes.barrier()
            self.folder.mkdir(parents=True, exist_ok=True)
        first = self.benchmarks(self.runs[0])
        names = [benchmark.name for benchmark in first]
        published = [benchmark.name for benchmark in first if benchmark.layout == "imagenet"]
        chosen = self.config.id or (published[0] if published else names[0])
        if self.baselines and not set(self.baselines) & (set(names) - {chosen}):
            _check_known(f"--baseline {self.config.baseline}: test set", list(self.baselines), names)
        self._describe(first, chosen)
        rows = [row for run in self.runs for row in self._rows(run)]
        report = Report(rows, first, chosen, self.baselines)
        self._write(report)
        return report

    def benchmarks(self, run: Run) -> list[Benchmark]:
        """The test sets for the classes of a run; read once for all runs with the same."""
        config = self.config
        if run.classes not in self._benchmarks:
            class_map = read_class_map(config.class_map) if config.class_map else None
            reader = Reader(
                run.classes, class_map, config.outside, config.on_bad_image, config.verify, self.processes.main
            )
            self._benchmarks[run.classes] = [read_benchmark(spec, reader) for spec in self.specs]
        return self._benchmarks[run.classes]

    def _rows(self, run: Run) -> Iterator[Row]:
        precision = self.config.precision or run.config.precision
        benchmarks = self.benchmarks(run)
        name = run.config.model.name or run.config.model.arch
        for alpha, model in run.models(self.alphas):
            title = run.name if alpha is None else f"{run.name} α {alpha:g}"
            state = f"{name}-{run.config.model.head_kind}-{precision}-{fingerprint(model)[:32]}"
            model = model.to(self.processes.device)
            results = {}
            for i, benchmark in enumerate(benchmarks):
                key = f"{state}-{benchmark.fingerprint[:32]}"
                found = self.results.find(key)
                if found is None:
                    progress = f"{title}: {benchmark.name} ({i + 1}/{len(benchmarks)})"
                    result = self._measure(model, benchmark, run, precision, progress)
                    self.results.add(key, result, model=run.name, alpha=alpha, data=benchmark.name)
                else:
                    result = found
                interval = f"[{result.low:.2f}, {result.high:.2f}]{'' if found is None else ' (reused)'}"
                self._say(f"{title}  {benchmark.name}: {result.top1:.2f} % {interval}")
                results[benchmark.name] = result
            yield Row(run.name, alpha, results)

    def _measure(
        self, model: ImageClassifier, benchmark: Benchmark, run: Run, precision: str, title: str
    ) -> Measurement:
        settings = LoaderConfig(
            batch_size=self.config.batch_size,
            image_size=model.backbone.config.image_size,
            train=False,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            threads=self.config.threads,
            device=str(self.processes.device),
        )
        batches: Iterable[Batch]
        if isinstance(benchmark.source, DiskImages) or benchmark.border:
            batches = DiskLoader(benchmark.source, settings, benchmark.border)
        else:
            batches = build_loader(benchmark.source, settings, self.config.backend)
        try:
            return measure(model, benchmark, self._shown(batches, len(benchmark), title), self.processes, precision)
        except ValueError as error:
            raise ValueError(f"{run.weights} on {benchmark.name}: {error}") from error

    def _shown(self, batches: Iterable[Batch], total: int, title: str) -> Iterator[Batch]:
        """The batches, with a progress bar over all processes' images."""
        with tqdm(
            total=total, desc=title, unit="img", unit_scale=True, leave=False, disable=not self.processes.main
        ) as bar:
            for batch in batches:
                yield batch
                bar.update(min(len(batch.labels) * self.processes.world_size, total - bar.n))

    def _describe(self, benchmarks: Sequence[Benchmark], chosen: str) -> None:
        for b in benchmarks:
            within = f", predictions among {int(b.allowed.sum()):,} classes" if b.restricted else ""
            role = "in distribution" if b.name == chosen else "shifted"
            what = f"{len(b):,} images of {b.num_classes:,} classes{within}"
            self._say(f"{b.name} ({b.layout}, {role}): {what} in {b.source.root}")
            for note in b.notes:
                self._say(f"  {note}")

    def _say(self, text: str) -> None:
        if self.processes.main:
            tqdm.write(text)

    def _write(self, report: Report) -> None:
        if not self.processes.main:
            return
        data = [
            {
                "name": b.name,
                "layout": b.layout,
                "path": str(b.source.root),
                "images": len(b),
                "classes": b.num_classes,
                "outputs": int(b.allowed.sum()),
                "notes": b.notes,
            }
            for b in report.benchmarks
        ]
        self.results.write({"id": report.id, "data": data, "rows": report.summary()})
        table = report.markdown()
        atomic_write(self.folder / "table.md", (table + "\n").encode())
        drawn = report.plot(self.folder / "tradeoff.png")
        print(f"\n{table}\n\nresults.json, table.md{', tradeoff.png' if drawn else ''}: {self.folder}")


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"--run names a folder twice: {', '.join(map(str, folders))}")
    depth = 1
    while len(names := {"/".join(path.parts[-depth:]) for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths] if names else []


def _own_test_sets(run: Run) -> list[Spec]:
    """What a run was tested on while it was trained."""
    data = run.config.data
    specs = [Spec("id", None, data.id)] if data.id is not None else []
    specs += [Spec(folder.resolve().name, None, folder) for folder in data.ood]
    if not specs:
        raise ValueError(f"--data is missing, and {run.folder} was trained without test sets")
    return specs


def _check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{what} {name!r} is none of the test sets ({', '.join(known)}){hint}")
