"""``python -m maskcf_fast.demo``: what counterfactual fine-tuning is for, in a few minutes on a CPU.

Builds a data set of real pixels with a spurious cue and a model pre-trained without the cue, fine-tunes the model
in several ways, and compares them in and out of distribution.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import UserError
from ..core.files import atomic_write, cache_dir, check_writable
from ..core.processes import Processes
from ..evaluation import Reader, Results, choose_specs
from ..evaluation.results import refuse_others
from ..methods import CounterfactualDistiller
from ..training.build import build_loaders, build_method, build_model, named_test_sets, scan
from ..training.runs import read_run
from ..training.settings import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig, check_seeds, to_yaml
from ..visualization.plots import Point, plot_counterfactuals, plot_tradeoff
from .comparison import build_suite, spread, train, train_or_reuse
from .demo_data import DemoData, DemoSpec, build_demo_data

# Weights of the distillation loss: the features of a tiny model are larger than CLIP's, for which 30 is meant.
WEIGHTS = {
    "fd": (0.3, 1.0, 2.0, 4.0),
    "object-single": (1.0, 2.0),
    "context-single": (1.0, 2.0),
    "random-single": (1.0, 2.0),
}
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of WiSE-FT
PRETRAINING = OptimConfig(epochs=10, batch_size=128, lr=2e-3, weight_decay=0.05, warmup=0.15)
FINE_TUNING = OptimConfig(epochs=6, batch_size=128, lr=2e-3, warmup=0.1)
SHOWN = "object-single"  # the strategy of the picture of counterfactual images


@dataclass(frozen=True)
class DemoConfig:
    """The embedded demo: fine-tuning methods compared on a small data set with a spurious cue."""

    out: Path = Path("runs/demo")
    """Folder for the table, the pictures and the runs. Runs that are finished there are not run again."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to fine-tune with; the data set and the pre-trained model are the same for all."""
    quick: bool = False
    """A shortened form: few images, one weight per method. Shows that everything works, and nothing more."""
    threads: int | None = None
    """Threads of torch; as many as it chooses by default."""

    def validate(self) -> None:
        """Raise a ValueError on seeds that cannot be used, or no thread."""
        check_seeds(self.seeds)
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")


@dataclass(frozen=True)
class Row:
    """One fine-tuned model: accuracies in percent, ``images_per_second`` of its training."""

    method: str
    weight: float | None  # of the distillation loss, or WiSE-FT's α
    seed: int
    id: float
    ood: float
    images_per_second: float | None = None


class Demo:
    """The parts of the demo, in their order."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.processes = Processes.start("cpu")
        self.started = time.perf_counter()
        self.spec = DemoSpec(counts=(600, 300, 200, 200)) if config.quick else DemoSpec()
        self.weights = {name: values[1:2] for name, values in WEIGHTS.items()} if config.quick else WEIGHTS

    def run(self) -> None:
        """Everything: data, pre-training, fine-tuning, table and pictures."""
        file = self.config.out / "results.json"
        check_writable(file.parent, file.name)
        refuse_others(file, "demo")
        self.prepare()
        rows = self._fine_tune_all()
        results = {"command": "demo", "data": self.data.checksum, "rows": [dataclasses.asdict(row) for row in rows]}
        atomic_write(file, json.dumps(results, indent=1).encode())
        table = markdown_table(rows)
        atomic_write(self.config.out / "table.md", (table + "\n").encode())
        print(f"\n{table}\n")
        self._plot(rows)
        names = "results.json, table.md, tradeoff.png, counterfactuals.png"
        print(f"{names}: {self.config.out}  ({(time.perf_counter() - self.started) / 60:.1f} minutes)")

    def prepare(self) -> tuple[TrainConfig, str]:
        """The data and the pre-trained model: settings to fine-tune with, and the data's checksum."""
        self.data = self._build_data()
        self.pretrained = self._pretrain()
        return dataclasses.replace(self._base(), model=ModelConfig("tiny", self.pretrained)), self.data.checksum

    def _build_data(self) -> DemoData:
        root = cache_dir("demo") / ("quick" if self.config.quick else "data")
        print(f"Data: real digits on real photographs; the tint of the background predicts the class ({root})")
        data = build_demo_data(root, spec=self.spec, progress=True)
        print(f"  checksum {data.checksum[:16]}")
        return data

    def _base(self) -> TrainConfig:
        data = DataConfig(self.data.train, self.data.id_test, (self.data.ood_test,))
        return TrainConfig(ModelConfig("tiny"), data, optim=self._shortened(FINE_TUNING), device="cpu", eval_every=0)

    def _shortened(self, optim: OptimConfig) -> OptimConfig:
        return dataclasses.replace(optim, epochs=1) if self.config.quick else optim

    def _pretrain(self) -> Path:
        """The robust model: trained where the tint says nothing about the class. Kept in the cache."""
        config = dataclasses.replace(
            self._base(),
            model=ModelConfig("tiny", Path("random")),
            data=DataConfig(self.data.pretrain, self.data.id_test, (self.data.ood_test,)),
            method=MethodConfig("ft"),
            optim=self._shortened(PRETRAINING),
        )
        folder = cache_dir("demo", "pretrained", key(config, self.data))
        config = dataclasses.replace(config, out=folder)
        path = folder / "model.safetensors"
        if path.exists():
            print(f"Pre-trained model: reused ({path})")
        else:
            print(f"Pre-trained model: trained once on images whose tint is independent of the class ({path})")
            train(config, self.processes, "pre-training")
        return path

    def _fine_tune_all(self) -> list[Row]:
        plan = [("ft", 0.0), *((name, w) for name, weights in self.weights.items() for w in weights)]
        print(f"Fine-tuning: {len(plan)} models × {len(self.config.seeds)} seed(s)")
        rows = []
        for seed in self.config.seeds:
            for i, (name, weight) in enumerate(plan):
                title = f"[{seed}: {i + 1}/{len(plan)}] {name}" + (f", weight {weight:g}" if weight else "")
                row, reused = self._fine_tune(name, weight, seed, title)
                speed = "reused" if reused else f"{row.images_per_second:.0f} images/s"
                print(f"  {title}: ID {row.id:.1f}  OOD {row.ood:.1f}  ({speed})", flush=True)
                rows.append(row)
            rows += self._interpolate(seed)
        return rows

    def _config(self, name: str, weight: float, seed: int) -> TrainConfig:
        if name in ("ft", "fd"):
            method = MethodConfig(name, weight=weight)
        else:
            method = MethodConfig(strategy=name, weight=weight)
        model = ModelConfig("tiny", self.pretrained)
        out = self.config.out / ("quick" if self.config.quick else "runs") / f"{name}-{weight:g}-seed{seed}"
        return dataclasses.replace(self._base(), model=model, method=method, seed=seed, out=out)

    def _fine_tune(self, name: str, weight: float, seed: int, title: str) -> tuple[Row, bool]:
        config = self._config(name, weight, seed)
        accuracy, speed, reused = train_or_reuse(config, self.processes, title, self.data.checksum)
        label = "FT" if name == "ft" else name
        return Row(label, weight or None, seed, accuracy["id"], accuracy["ood_test"], speed), reused

    def _interpolate(self, seed: int) -> list[Row]:
        """WiSE-FT: weights between the zero-shot and the fine-tuned model."""
        config = self._config("ft", 0.0, seed)
        assert config.out is not None
        run = read_run(config.out)
        specs = choose_specs([], None, named_test_sets(config.data))
        results = Results(config.out.parent / "measurements.json", "demo")
        suite = build_suite(config, specs, Reader(run.classes), results, self.processes)
        rows = []
        for alpha, model in run.models(ALPHAS):
            if alpha is None:
                continue
            found = suite.measure(model, config.precision, f"  [{seed}] WiSE-FT α {alpha:g}")
            accuracy = found["id"].top1, found["ood_test"].top1
            rows.append(Row("WiSE-FT", alpha, seed, *accuracy))
            if alpha == 0:
                rows.append(Row("zero-shot", None, seed, *accuracy))
        return rows

    def _plot(self, rows: list[Row]) -> None:
        curves: dict[str, list[Point]] = {}
        for (method, weight), group in grouped(rows).items():
            label = "" if weight is None else f"α {weight:g}" if method == "WiSE-FT" else f"{weight:g}"
            curves.setdefault(method, []).append(Point(label, [r.id for r in group], [r.ood for r in group]))
        plot_tradeoff(self.config.out / "tradeoff.png", curves, "Accuracy in and out of distribution")

        self._plot_counterfactuals()

    def _plot_counterfactuals(self) -> None:
        """Training images as the first step of counterfactual fine-tuning sees them."""
        config = self._config(SHOWN, self.weights[SHOWN][0], self.config.seeds[0])
        manifest, tests = scan(config.data, self.processes, config.seed)
        model = build_model(config.model, len(manifest.classes), config.seed)
        vit = model.backbone.config
        loader, _ = build_loaders(config, manifest, tests, vit.image_size, self.processes)
        images, labels, _ = next(iter(loader))
        method = build_method(config.method, model)
        assert isinstance(method, CounterfactualDistiller)
        draw = method.strategy.draw(len(images), vit.num_patches, generator=torch.Generator().manual_seed(0))
        step = method(images, labels, draw=draw)
        assert step.cam is not None
        assert step.mask is not None
        filling = method.strategy.filling
        refilled = filling.pixels(images.permute(0, 3, 1, 2), step.mask, draw.donors).permute(0, 2, 3, 1)
        captions = [manifest.classes[label].replace("_", " ") for label in labels[:6]]
        shown = (images[:6], step.cam[:6], step.mask[:6], refilled[:6])
        side = vit.image_size // vit.patch_size
        plot_counterfactuals(self.config.out / "counterfactuals.png", *shown, grid=side, captions=captions)


def key(config: TrainConfig, data: DemoData) -> str:
    """What a run depends on, as a short name."""
    text = to_yaml(dataclasses.replace(config, out=None)) + data.checksum
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    """Rows that differ in the seed only."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.weight), []).append(row)
    order = ["zero-shot", "FT", "WiSE-FT", *WEIGHTS]
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1] or 0)))


def markdown_table(rows: Sequence[Row]) -> str:
    """The comparison: means over the seeds, ± their standard deviation."""
    groups = grouped(rows)
    by_seed = {(row.method, row.seed): row for row in rows if row.method in ("zero-shot", "FT")}
    lines = [
        "| method | weight | ID % | OOD % | OOD − zero-shot | ID gain kept | OOD loss recovered | OOD − FD at equal ID "
        "| images/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (method, weight), group in groups.items():
        start = [by_seed["zero-shot", row.seed] for row in group]
        tuned = [by_seed["FT", row.seed] for row in group]
        kept = recovered = above = ""
        if method not in ("zero-shot", "FT"):
            kept = percent([r.id - s.id for r, s in zip(group, start, strict=True)], start, tuned, "id")
            recovered = percent([r.ood - t.ood for r, t in zip(group, tuned, strict=True)], tuned, start, "ood")
        if method not in ("zero-shot", "FT", "WiSE-FT", "fd"):
            above = spread([row.ood - on_curve(rows, row) for row in group], signed=True)
        speeds = [row.images_per_second for row in group if row.images_per_second]
        cells = [
            method,
            "" if weight is None else f"α {weight:g}" if method == "WiSE-FT" else f"{weight:g}",
            spread([row.id for row in group]),
            spread([row.ood for row in group]),
            ""
            if method == "zero-shot"
            else spread([r.ood - s.ood for r, s in zip(group, start, strict=True)], signed=True),
            kept,
            recovered,
            above,
            f"{statistics.mean(speeds):.0f}" if speeds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(parts: Sequence[float], low: Sequence[Row], high: Sequence[Row], name: str) -> str:
    """The mean part as a share of the mean distance from ``low`` to ``high``."""
    whole = statistics.mean(getattr(h, name) - getattr(x, name) for x, h in zip(low, high, strict=True))
    return f"{100 * statistics.mean(parts) / whole:.0f} %" if whole else "–"


def on_curve(rows: Sequence[Row], at: Row) -> float:
    """OOD accuracy at the ID accuracy of ``at``, on the same seed's curve through zero-shot, FD and FT."""
    points = sorted((r.id, r.ood) for r in rows if r.seed == at.seed and r.method in ("zero-shot", "fd", "FT"))
    x = min(max(at.id, points[0][0]), points[-1][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise AssertionError("x lies between the first and the last point")
