"""``python -m maskcf_fast.table``: every method of the paper's table, over several seeds.

Each method × seed is a run of its own in OUT/<method>-seed<k>, measured as ``python -m maskcf_fast.evaluate`` does. A
finished run is reused if its settings are the same, an interrupted one continues where it stopped, and what is measured
is not measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors.torch import load_file
from torch import nn

from ..core.errors import UserError
from ..core.files import atomic_write
from ..core.names import unknown
from ..core.precision import check_precision
from ..core.processes import Processes
from ..core.tensors import fingerprint
from ..evaluation import Reader, Results, Suite, choose_specs
from ..evaluation.benchmark import read_class_map
from ..evaluation.report import markdown_table
from ..methods import OutputEnsemble, average, registry, strategy_names
from ..training.build import as_benchmark, build_model, named_test_sets, scan
from ..training.runs import Run, read_run, stock
from ..training.settings import DataConfig, ModelConfig, OptimConfig, TrainConfig, check_seeds, find_yaml, parse
from ..visualization.plots import Point, plot_tradeoff
from .comparison import images_checksum, spread, train_or_reuse
from .demo_model import demo_start

PAPER = ("lp", "ft", "lp-ft", "l2-sp", "kd", "cf-kd", "fd", *strategy_names())
FURTHER = (
    "ft-ema", "ft-average", "ft-lora", "ft-last-blocks", "ft-layer-decay", "ft-mixup", "ft-randaugment",
    "fd-trajectory",
)  # fmt: skip
TRAINED = (*PAPER, *FURTHER)
MERGED = ("soup", "model-stock")  # of all seeds
DERIVED = ("zero-shot", "wise-ft", "ensemble", *MERGED)  # of the pre-trained model and the runs of ft
METHODS = ("zero-shot", *PAPER[:4], "wise-ft", "ensemble", "soup", *PAPER[4:])
ROW = ("augment", "mixup", "cache")  # of the settings of data, those that a row may have of its own
WISE = "wise:"  # before a method: its weights and the initial ones, in shares that validation images choose
WISE_ALPHAS = tuple(i / 10 for i in range(11))
DEMO_WEIGHT = 1.0  # of distillation: the features of a tiny model are larger than CLIP's, for which 30 is meant


@dataclass(frozen=True)
class TableConfig:
    """Fine-tune with every method and compare accuracy in and out of distribution."""

    methods: tuple[str, ...] = METHODS
    """Rows: trained ones are presets of maskcf_fast.train, or YAML files of your own (lp-ft is lp, then ft from its
    head); wise-ft (weights between zero-shot and ft), ensemble (their mean probabilities), soup (the mean weights of
    ft's seeds) and model-stock (these, nearer to zero-shot the less they agree) train nothing but ft. fd:4 is fd with
    --method.weight 4; several weights of a method make a curve. wise:fd:4 lies between zero-shot and fd:4, where
    validation images (--data.val, --data.holdout) are best. By default the paper's, without ft-ema, ft-average,
    ft-lora, ft-last-blocks, ft-layer-decay, ft-mixup, ft-randaugment and fd-trajectory."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to fine-tune with."""
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Of WiSE-FT, each in [0, 1]; the paper's is 0.5."""
    test: tuple[str, ...] = ()
    """Test sets, [NAME=][LAYOUT:]PATH, as --data of python -m maskcf_fast.evaluate, whose --help lists the layouts; by
    default those that training is watched with, --data.id and --data.ood."""
    id: str | None = None
    """Name of the test set in distribution; by default the one of layout imagenet, else the first."""
    class_map: Path | None = None
    """YAML or JSON file that gives the model's class, or a list of them, for what a test set calls otherwise."""
    outside: Literal["error", "skip"] = "error"
    """Stop at classes of a test set that the model does not know, or leave their images out."""
    out: Path = Path("runs/table")
    """Folder for the runs, table.md, table.json, tradeoff.png, and results.json with all measurements."""
    demo: bool = False
    """The embedded demo data and its pre-trained tiny model."""
    quick: bool = False
    """With --demo: few images and one epoch. Shows that everything works, and nothing more."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """fp32, tf32 (its matrix products in TF32, on NVIDIA GPUs) or bf16."""
    device: str = "auto"
    """cpu, cuda, or auto."""

    def validate(self) -> None:
        """Check the rows and seeds.

        Raises:
            ValueError: An unknown method (the nearest is suggested), no seed, one twice, no α or one outside [0, 1],
                or a setting that the demo does not take.
        """
        for text in self.methods:
            name, weight = parse_row(text)
            known = TRAINED if text.startswith(WISE) else (*TRAINED, *DERIVED)
            # Among them are the strategies that came with the package: fills may have been registered since.
            if name not in (*known, *strategy_names()) and not Path(name).is_file():
                raise unknown("method", name, known)
            reads = registry.METHODS[_preset(name)[0].method.name].reads
            if weight is not None and not (0 <= weight < float("inf") and "weight" in reads):
                raise UserError(f"--methods {text}: {name} takes no weight {weight:g}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError("--methods needs at least one, and none twice")
        check_seeds(self.seeds)
        if bad := [alpha for alpha in self.alphas if not 0 <= alpha <= 1]:
            raise UserError(f"--alphas must lie in [0, 1], got {bad[0]}")
        if "wise-ft" in self.methods and not self.alphas:
            raise UserError("--alphas needs at least one for wise-ft: give one, or --methods without wise-ft")
        if self.demo and (fixed := self._fixed_by_demo()):
            raise UserError(f"--demo has its own data, model and settings: leave out {', '.join(fixed)}, or --demo")
        if "model-stock" in self.methods and len(self.seeds) < 2:
            raise UserError("model-stock needs at least two seeds, whose runs of ft it is made of: --seeds 0 1")
        if self.quick and not self.demo:
            raise UserError("--quick shortens the demo only: add --demo")
        if not self.demo and self.data.train is None:
            raise UserError("--data.train DIR is missing (--demo needs no data)")

    def _fixed_by_demo(self) -> list[str]:
        """Options that are not at their defaults and would have no effect on the demo."""
        fixed = []
        for name in ("model", "data", "optim"):
            own, default = getattr(self, name), getattr(TableConfig(), name)
            changed = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(default, f.name)]
            fixed += [f"--{name}.{option.replace('_', '-')}" for option in changed]
        fixed += ["--precision"] if self.precision != "fp32" else []
        return fixed + (["--device"] if self.device not in ("auto", "cpu") else [])


@dataclass(frozen=True)
class TableRow:
    """Accuracy in percent by test set, of one model."""

    method: str
    seed: int | None  # None: of all seeds together
    accuracy: dict[str, float]
    per_class: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # images, and how many are right

    def shifted(self, id: str) -> float:
        """Mean accuracy over the test sets but ``id``, each counting the same."""
        return statistics.mean(value for name, value in self.accuracy.items() if name != id)


class Table:
    """The runs and the rows made of them."""

    def __init__(self, config: TableConfig, processes: Processes) -> None:
        config.validate()
        self.config, self.processes = config, processes
        self.basis = ""
        self.base = TrainConfig(
            config.model, config.data, optim=config.optim, precision=config.precision, device=config.device
        )
        if config.demo:
            self.base, demo = demo_start(config.quick, processes)
            self.basis = demo.checksum
        data = self.base.data
        own = demo.tests if config.demo else named_test_sets(data)
        if not data.holdout and data.val is None and any(method.startswith(WISE) for method in config.methods):
            raise UserError(f"{WISE}METHOD needs images to choose its α with: --data.holdout N or --data.val DIR")
        for method in set(config.methods) - set(DERIVED):  # now, and not when its turn comes
            self.settings(method, config.seeds[0]).validate()
        specs = choose_specs(config.test, config.id, own)
        if len(specs) < 2:
            raise UserError(
                f"a test set in distribution and at least one shifted are needed, got {len(specs)}: "
                "--test [NAME=][LAYOUT:]PATH…, or --data.id DIR and --data.ood DIR…"
            )
        class_map = read_class_map(config.class_map) if config.class_map else None
        check_precision(processes.device, config.precision)
        train = scan(dataclasses.replace(data, holdout=0), processes, 0)[0]  # runs may hold out others
        self.classes = train.classes
        if "model-stock" in config.methods:  # now, and not after all training
            starts = [fingerprint(self.untrained(seed)) for seed in config.seeds[:2]]
            if starts[0] != starts[1]:
                raise UserError("model-stock needs runs from one start, and each seed draws a head: give --model.head")
        self.basis = self.basis or images_checksum(train)
        options = (data.on_bad_image, data.verify, processes.main, data.exif)
        reader = Reader(self.classes, class_map, config.outside, *options)
        results = Results(config.out / "results.json", "table", writes=processes.main)
        parts = processes.world_size * self.base.optim.accumulate
        self.suite = Suite(
            specs,
            reader,
            results,
            processes,
            id=config.id,
            batch_size=max(1, self.base.optim.batch_size // parts),
            threads=data.threads,
            backend=data.backend,
        )

    def run(self) -> str:
        """Train, evaluate and write what is asked for; the table as Markdown."""
        config, suite, rows = self.config, self.suite, self.rows()
        notes = [f"- {' '.join(note.split())}" for benchmark in suite.benchmarks for note in benchmark.notes]
        text = "\n".join([markdown(rows, suite.id), *(["", *notes] if notes else [])])
        if self.processes.main:
            content = {"id": suite.id, "data": suite.summary(), "rows": [dataclasses.asdict(row) for row in rows]}
            atomic_write(config.out / "table.json", json.dumps(content, indent=1).encode())
            atomic_write(config.out / "table.md", (text + "\n").encode())
            plot_tradeoff(config.out / "tradeoff.png", curves(rows, suite.id), "Accuracy in and out of distribution")
        return text

    def rows(self) -> list[TableRow]:
        """Train and evaluate what is asked for."""
        config, rows = self.config, []
        self.suite.describe()
        for seed in config.seeds:
            for i, method in enumerate(config.methods):
                if method not in MERGED:
                    rows += self._rows(method, seed, f"[seed {seed}: {i + 1}/{len(config.methods)}]")
        for method in [method for method in config.methods if method in MERGED]:
            rows += self._rows(method, None, "[all seeds]")
        return rows

    def _rows(self, method: str, seed: int | None, title: str) -> list[TableRow]:
        rows = []
        for name, model in self._merged(method) if seed is None else self._models(method, seed):
            rows.append(self.measure(model, name, seed, title))
        return rows

    def measure(self, model: nn.Module, name: str, seed: int | None, title: str) -> TableRow:
        """The row of a model, on all test sets."""
        found = self.suite.measure(model, self.base.precision, f"{title} {name}", model=name, seed=seed)
        accuracy = {data: result.top1 for data, result in found.items()}
        return TableRow(name, seed, accuracy, {data: result.per_class for data, result in found.items()})

    def untrained(self, seed: int) -> nn.Module:
        """What every method of the seed begins with."""
        return build_model(self.base.model, len(self.classes), seed, self.classes)

    def _models(self, method: str, seed: int) -> Iterator[tuple[str, nn.Module]]:
        """The models of a method, by what they are called."""
        if method == "zero-shot":
            yield method, self.untrained(seed)
        elif method == "ensemble":
            run = self.trained("ft", seed, "final")
            yield method, OutputEnsemble([run.initial(), run.tuned()])
        elif method == "wise-ft":
            for alpha, model in self.trained("ft", seed, "final").models(self.config.alphas):
                if alpha is not None:
                    yield f"wise-ft α {alpha:g}", model
        elif method.startswith(WISE):
            run = self.trained(method, seed, "final")
            *_, (_, model) = run.models([self._best_alpha(run, row_name(method))])
            yield row_name(method), model
        else:
            yield row_name(method), self.trained(method, seed).tuned()

    def _best_alpha(self, run: Run, title: str) -> float:
        """WiSE-FT's α that is best on the run's validation images; of equal ones the nearest to the start."""
        images = scan(run.config.data, self.processes, run.config.seed)[1]["holdout"]
        suite = self.suite.on(as_benchmark("holdout", images))
        found = {}
        for alpha, model in run.models(WISE_ALPHAS):
            if alpha is not None:
                about = {"model": title, "alpha": alpha, "seed": run.config.seed}
                result = suite.measure(model, self.base.precision, f"{title} α {alpha:g}", **about)
                found[alpha] = result["holdout"].top1
        return max(found, key=lambda alpha: (found[alpha], -alpha))

    def _merged(self, method: str) -> Iterator[tuple[str, nn.Module]]:
        runs = [self.trained("ft", seed) for seed in self.config.seeds]
        if method == "soup":
            model = runs[0].tuned()
            model.load_state_dict(average([load_file(run.weights) for run in runs]))
        else:
            model = stock(runs)
        yield method, model

    def trained(self, method: str, seed: int, weights: Literal["auto", "final"] = "auto") -> Run:
        """The run of a method: its best epoch on the held-out images, as in the paper, or without them the last.

        WiSE-FT is made of the last epoch ("final"), as in the paper, and so is the ensemble that is held against it.
        """
        if method == "lp-ft":
            self.trained("lp", seed)
        config = self.settings(method, seed)
        assert config.out is not None
        train_or_reuse(config, self.processes, f"{method}, seed {seed}", self.basis)
        return read_run(config.out, weights)

    def run_folder(self, method: str, seed: int) -> Path:
        """Where the run of a method is, or would be."""
        return self.config.out / f"{row_name(method.removeprefix(WISE), '-')}-seed{seed}"

    def settings(self, method: str, seed: int) -> TrainConfig:
        """The run of a method: its preset's settings on top of the table's, which say what is held out."""
        name, weight = parse_row(method)
        config = dataclasses.replace(self.base, seed=seed, out=self.run_folder(method, seed))
        if name == "lp-ft":  # Kumar et al., "Fine-tuning can distort pretrained features", ICLR 2022
            probe = self.config.out / f"lp-seed{seed}" / "model.safetensors"
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=probe, head=None))
        preset, optim, data = _preset(name)
        config = dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, **optim), data=dataclasses.replace(config.data, **data)
        )
        chosen = preset.method
        if weight is None and self.config.demo and registry.METHODS[chosen.name].distils:
            weight = DEMO_WEIGHT
        if weight is not None:
            chosen = dataclasses.replace(chosen, weight=weight)
        return dataclasses.replace(config, method=chosen)


def parse_row(text: str) -> tuple[str, float | None]:
    """A method, or preset of one's own, and its weight where one is given, from NAME or NAME:WEIGHT, with or without
    wise: before it."""
    text = text.removeprefix(WISE)
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, None)
    except ValueError:
        raise UserError(f"--methods {text!r} is neither NAME nor NAME:WEIGHT, such as fd:4") from None


def row_name(text: str, between: str = " ") -> str:
    """What a row is called: ``fd 4``."""
    name, weight = parse_row(text)
    wise = WISE if text.startswith(WISE) else ""
    return wise + Path(name).stem + (f"{between}{weight:g}" if weight is not None else "")


@functools.cache
def _preset(name: str) -> tuple[TrainConfig, dict[str, Any], dict[str, Any]]:
    """A preset or a file of one's own, and what it says of the optimiser and of what images are made into.

    A strategy's name says it all. lp-ft is ft, and what trains nothing stands on it.

    Raises:
        UserError: The file says what is the table's to say.
    """
    if name in strategy_names():
        return parse(["--method.strategy", name], name="table"), {}, {}
    path = find_yaml("ft" if name in DERIVED or name == "lp-ft" else name)
    config, said = parse(["--config", str(path)], name="table"), yaml.safe_load(path.read_text())
    optim, data = said.get("optim", {}), said.get("data", {})
    other = [*(said.keys() - {"method", "optim", "data"}), *(f"data.{key}" for key in data.keys() - {*ROW, "holdout"})]
    if other:
        raise UserError(f"{path} sets {min(other)}, which is of the whole table: give that to the table, not to a row")
    return (
        config,
        {key: getattr(config.optim, key) for key in optim},
        {key: getattr(config.data, key) for key in data if key in ROW},
    )


def grouped(rows: Sequence[TableRow]) -> dict[str, list[TableRow]]:
    """Rows that differ in the seed only."""
    groups: dict[str, list[TableRow]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return groups


def markdown(rows: Sequence[TableRow], id: str) -> str:
    """One line per method: means over the seeds in per cent, ± their standard deviation."""
    shifted = [name for name in rows[0].accuracy if name != id]
    lines = []
    for method, group in grouped(rows).items():
        accuracies = [[row.accuracy[name] for row in group] for name in (id, *shifted)]
        lines.append([method, *map(spread, accuracies), spread([row.shifted(id) for row in group])])
    return markdown_table(["method", f"{id} (ID)", *shifted, "OOD average"], lines)


def curves(rows: Sequence[TableRow], id: str) -> dict[str, list[Point]]:
    """Accuracy in distribution against the mean of the shifted test sets, by method and then by weight."""
    found: dict[str, list[Point]] = {}
    for method, group in grouped(rows).items():
        name, _, label = method.partition(" ")
        name = {"ft": "FT", "wise-ft": "WiSE-FT"}.get(name, name)
        point = Point(label, [row.accuracy[id] for row in group], [row.shifted(id) for row in group])
        found.setdefault(name, []).append(point)
    return found
