"""``python -m maskcf_fast.table``: every method of the paper's table, over several seeds.

Each method × seed is a run of its own in OUT/<method>-seed<k>. A finished run is reused if its settings are the same,
an interrupted one continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file

from ._cache import atomic_write
from .comparison import Evaluation, spread, train_or_reuse
from .distill import PAPER_CUTS, OutputEnsemble, average, interpolate
from .plots import Point, plot_tradeoff
from .training.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig, find_yaml
from .training.distributed import Processes

TRAINED = ("lp", "ft", "lp-ft", "l2-sp", "kd", "cf-kd", "fd", *PAPER_CUTS)
DERIVED = ("zero-shot", "wise-ft", "ensemble", "soup")  # of the pre-trained model and the runs of ft
METHODS = ("zero-shot", *TRAINED[:4], "wise-ft", "ensemble", "soup", *TRAINED[4:])
DEMO_WEIGHT = 1.0  # of distillation: the features of a tiny model are larger than CLIP's, for which 30 is meant


@dataclass(frozen=True)
class TableConfig:
    """Fine-tune with every method and compare accuracy in and out of distribution."""

    methods: tuple[str, ...] = METHODS
    """Rows: trained ones are presets of maskcf_fast.train (lp-ft is lp, then ft from its head); wise-ft (weights
    between zero-shot and ft), ensemble (their mean probabilities) and soup (the mean weights of ft's seeds) train
    nothing but ft."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to fine-tune with."""
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Of WiSE-FT, each in [0, 1]; the paper's is 0.5."""
    out: Path = Path("runs/table")
    """Folder for the runs, table.md, table.json and tradeoff.png."""
    demo: bool = False
    """The embedded demo data and its pre-trained tiny model."""
    quick: bool = False
    """With --demo: few images and one epoch. Shows that everything works, and nothing more."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 or bf16."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def validate(self) -> None:
        """Check the rows and seeds.

        Raises:
            ValueError: An unknown method (the nearest is suggested), no seed, one twice, or an α outside [0, 1].
        """
        for name in self.methods:
            if name not in METHODS:
                near = difflib.get_close_matches(name, METHODS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown method {name!r} (there are {', '.join(METHODS)}){hint}")
        for option, values in {"methods": self.methods, "seeds": self.seeds}.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{option} needs at least one, and none twice")
        if bad := [alpha for alpha in self.alphas if not 0 <= alpha <= 1]:
            raise ValueError(f"--alphas must lie in [0, 1], got {bad[0]}")
        if self.quick and not self.demo:
            raise ValueError("--quick shortens the demo only: add --demo")
        if not self.demo and (self.data.train is None or self.data.id is None or not self.data.ood):
            raise ValueError("--data.train DIR, --data.id DIR and --data.ood DIR… are needed (or --demo)")


@dataclass(frozen=True)
class TableRow:
    """Accuracy in percent by test set, of one model."""

    method: str
    seed: int | None  # None: of all seeds together
    accuracy: dict[str, float]


class Table:
    """The runs and the rows made of them."""

    def __init__(self, config: TableConfig) -> None:
        config.validate()
        self.config = config
        self.processes = Processes.start("cpu" if config.demo else config.device)
        self.basis = ""
        self.base = TrainConfig(
            config.model, config.data, optim=config.optim, precision=config.precision, device=config.device
        )
        if config.demo:
            from .demo import Demo, DemoConfig

            demo = Demo(DemoConfig(quick=config.quick))
            self.base, self.basis = demo.prepare()
        self.rows: list[TableRow] = []
        self.done: dict[tuple[str, int], dict[str, float]] = {}

    def run(self) -> str:
        """Train, evaluate and write what is asked for; the table as Markdown."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        for seed in config.seeds:
            for i, method in enumerate(config.methods):
                title = f"[seed {seed}: {i + 1}/{len(config.methods)}]"
                if method == "soup":
                    continue
                made = self._derived(method, seed) if method in DERIVED else [(method, self._trained(method, seed))]
                for name, accuracy in made:
                    self._add(title, TableRow(name, seed, accuracy))
        if "soup" in config.methods:
            self._add("[all seeds]", TableRow("soup", None, self._soup()))
        text = markdown(self.rows)
        content = {"rows": [dataclasses.asdict(row) for row in self.rows]}
        atomic_write(config.out / "table.json", json.dumps(content, indent=1).encode())
        atomic_write(config.out / "table.md", (text + "\n").encode())
        plot(self.rows, config.out / "tradeoff.png")
        return text

    def _add(self, title: str, row: TableRow) -> None:
        self.rows.append(row)
        shown = "  ".join(f"{name} {value:.1f}" for name, value in row.accuracy.items())
        print(f"{title} {row.method}: {shown}", flush=True)

    def settings(self, method: str, seed: int) -> TrainConfig:
        """The run of a method: its preset's method section, on the table's data, model and optimiser."""
        config = dataclasses.replace(self.base, seed=seed, out=self.config.out / f"{method}-seed{seed}")
        if method == "lp-ft":  # Kumar et al., "Fine-tuning can distort pretrained features", ICLR 2022
            probe = self.config.out / f"lp-seed{seed}" / "model.safetensors"
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=probe, head=None))
        section = yaml.safe_load(find_yaml("ft" if method == "lp-ft" else method).read_text())["method"]
        chosen = MethodConfig(**section)
        if self.config.demo and chosen.name not in ("ft", "lp", "l2-sp"):
            chosen = dataclasses.replace(chosen, weight=DEMO_WEIGHT)
        if chosen.name == "l2-sp":  # the penalty takes the place of weight decay
            config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=0.0))
        return dataclasses.replace(config, method=chosen)

    def _trained(self, method: str, seed: int) -> dict[str, float]:
        if (method, seed) not in self.done:
            if method == "lp-ft":
                self._trained("lp", seed)
            config = self.settings(method, seed)
            result = train_or_reuse(config, self.processes, f"{method}, seed {seed}", self.basis)
            accuracy = result.accuracy
            if config.data.holdout:  # the paper takes the epoch that was best on the held-out images
                evaluation = Evaluation(config, self.processes)
                accuracy = self._measure(evaluation, evaluation.model(self._weights(method, seed)))
            self.done[method, seed] = accuracy
        return self.done[method, seed]

    def _weights(self, method: str, seed: int) -> Path:
        name = "best" if self.base.data.holdout else "model"
        return self.config.out / f"{method}-seed{seed}" / f"{name}.safetensors"

    def _measure(self, evaluation: Evaluation, model: torch.nn.Module) -> dict[str, float]:
        accuracy = evaluation.accuracy(model)
        return {name: value for name, value in accuracy.items() if name != "holdout"}

    def _derived(self, method: str, seed: int) -> list[tuple[str, dict[str, float]]]:
        if method != "zero-shot":
            self._trained("ft", seed)
        evaluation = Evaluation(self.settings("ft", seed), self.processes)
        start = evaluation.model()
        if method == "zero-shot":
            return [(method, self._measure(evaluation, start))]
        tuned = evaluation.model(self._weights("ft", seed))
        if method == "ensemble":
            return [(method, self._measure(evaluation, OutputEnsemble([start, tuned])))]
        ends = {name: tensor.clone() for name, tensor in start.state_dict().items()}, tuned.state_dict()
        rows = []
        for alpha in self.config.alphas:
            start.load_state_dict(interpolate(*ends, alpha))
            rows.append((f"wise-ft α {alpha:g}", self._measure(evaluation, start)))
        return rows

    def _soup(self) -> dict[str, float]:
        for seed in self.config.seeds:
            self._trained("ft", seed)
        evaluation = Evaluation(self.settings("ft", self.config.seeds[0]), self.processes)
        model = evaluation.model()
        model.load_state_dict(average([load_file(self._weights("ft", seed)) for seed in self.config.seeds]))
        return self._measure(evaluation, model)


def out_of_distribution(accuracy: dict[str, float]) -> list[str]:
    """The names of the OOD sets."""
    return [name for name in accuracy if name not in ("id", "holdout")]


def grouped(rows: Sequence[TableRow]) -> dict[str, list[TableRow]]:
    """Rows that differ in the seed only."""
    groups: dict[str, list[TableRow]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return groups


def mean_ood(row: TableRow) -> float:
    """Mean accuracy over the OOD sets."""
    return statistics.mean(row.accuracy[name] for name in out_of_distribution(row.accuracy))


def markdown(rows: Sequence[TableRow]) -> str:
    """One line per method: means over the seeds, ± their standard deviation."""
    sets = out_of_distribution(rows[0].accuracy)
    lines = [f"| method | ID % | {' | '.join(sets)} | OOD average |", "|---|--:|" + "--:|" * (len(sets) + 1)]
    for method, group in grouped(rows).items():
        columns = [[row.accuracy[name] for row in group] for name in ("id", *sets)]
        cells = [method, *map(spread, columns), spread([mean_ood(row) for row in group])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[TableRow], path: Path) -> None:
    """ID against the mean OOD accuracy."""
    curves: dict[str, list[Point]] = {}
    for method, group in grouped(rows).items():
        name, _, label = method.partition(" ")
        name = {"ft": "FT", "wise-ft": "WiSE-FT"}.get(name, name)
        point = Point(label, [row.accuracy["id"] for row in group], [mean_ood(row) for row in group])
        curves.setdefault(name, []).append(point)
    plot_tradeoff(path, curves, "Accuracy in and out of distribution")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import tyro

    from .train import CONTINUES, report_errors

    def run() -> int:
        config: Any = tyro.cli(TableConfig, args=arguments, prog="python -m maskcf_fast.table", description=__doc__)
        table = Table(config)
        print(f"\n{table.run()}\n\ntable.md, table.json, tradeoff.png: {config.out}")
        return 0

    return report_errors(run, CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
