"""``maskcf demo``: what counterfactual fine-tuning is for, in a few minutes on a CPU.

A model that reads white digits is fine-tuned on images half of whose digits are black, which it can honestly learn, and
whose background gives the digit away, which it can lean on instead. Methods are compared where the background goes on
telling (ID), and where it does not (OOD).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import UserError
from ..core.files import atomic_write, check_writable
from ..core.processes import Processes
from ..data import scan_images
from ..evaluation.report import markdown_table
from ..evaluation.results import refuse_others
from ..methods import MaskStrategy
from ..methods.label_map import LabelMap
from ..training.runs import read_run
from ..training.settings import check_seeds
from ..visualization.board import board_images
from ..visualization.draws import Draws
from ..visualization.maps import counterfactuals, explain_labels
from ..visualization.plots import draw_sheet, draw_tradeoff, heat_maps, mask_maps
from .comparison import spread, train_or_reuse
from .table import Table, TableConfig, TableRow, curves, grouped

SHOWN = "object-single"
# Weights of the distillation loss: the features of a tiny model are larger than CLIP's, for which 30 is meant.
ROWS = ("zero-shot", "ft", "wise-ft", "fd:1", "fd:3", f"{SHOWN}:1", f"{SHOWN}:3")
CEILING = "ft-no-cue"  # fine-tuning where the background says nothing: all that can honestly be learnt
ID, OOD = "id", "ood"
SPOKEN = {"fd": "feature distillation (FD)", SHOWN: "object mask", CEILING: "FT where no colour tells"}


@dataclass(frozen=True)
class DemoConfig:
    """The embedded demo: fine-tuning methods compared on a small data set with a spurious cue."""

    out: Path = Path("runs/demo")
    """Folder for the table, the picture and the runs. Runs that are finished there are not run again."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to fine-tune with; the data set and the pre-trained model are the same for all."""
    quick: bool = False
    """A shortened form: few images, one epoch. Shows that everything works, and nothing more."""
    threads: int | None = None
    """Threads of torch; as many as it chooses by default."""

    def validate(self) -> None:
        """Raise a ValueError on seeds that cannot be used, or no thread."""
        check_seeds(self.seeds)
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")


class Demo:
    """Data, pre-trained model, fine-tuned models, table and picture."""

    def __init__(self, config: DemoConfig) -> None:
        self.started = time.perf_counter()
        self.config, self.results = config, config.out / "results.json"
        check_writable(config.out, self.results.name)
        refuse_others(self.results, "demo")
        runs = config.out / ("quick" if config.quick else "runs")
        table = TableConfig(ROWS, config.seeds, (0.5,), demo=True, quick=config.quick, out=runs)
        self.table = Table(table, Processes.start("cpu"))

    def run(self) -> None:
        """Train, measure and write everything."""
        rows = self.table.rows() + [self._ceiling(seed) for seed in self.config.seeds]
        content = {"command": "demo", "data": self.table.basis, "rows": [dataclasses.asdict(row) for row in rows]}
        atomic_write(self.results, json.dumps(content, indent=1).encode())
        text = markdown(rows)
        atomic_write(self.config.out / "table.md", (text + "\n").encode())
        self._draw(rows, self.config.out / "demo.png")
        minutes = (time.perf_counter() - self.started) / 60
        print(f"\n{text}\n\nresults.json, table.md, demo.png: {self.config.out}  ({minutes:.1f} minutes)")

    def _ceiling(self, seed: int) -> TableRow:
        config = self.table.settings("ft", seed)
        assert config.out is not None
        assert config.data.train is not None
        data = dataclasses.replace(config.data, train=config.data.train.with_name("no_cue"))
        out = config.out.with_name(f"no-cue-seed{seed}")
        config = dataclasses.replace(config, data=data, out=out)
        train_or_reuse(config, self.table.processes, f"{CEILING}, seed {seed}", self.table.basis)
        return self.table.measure(read_run(out).tuned(), CEILING, seed, f"[seed {seed}]")

    def _draw(self, rows: Sequence[TableRow], path: Path) -> None:
        """The images, the step on some of them, and the comparison."""
        from matplotlib.figure import Figure

        run = self.table.trained(f"{SHOWN}:1", self.config.seeds[0])
        model, folder = run.tuned(), run.config.data.train
        assert folder is not None
        vit = model.backbone.config
        # One of each class, as they lie in its order.
        told, untold = (
            board_images(scan_images(folder.with_name(name)), vit.image_size, len(run.classes))
            for name in ("train", "ood_test")
        )
        images, labels = (each[:3] for each in told)
        cam, _ = explain_labels(model, LabelMap("relevance", "logit", 0, vit), images, labels)
        strategy = MaskStrategy.from_name(SHOWN)
        draw = Draws.draw(len(images), vit.num_patches, torch.Generator().manual_seed(0)).of(strategy)
        mask, made = counterfactuals(strategy, images, cam, draw)
        step = [images, *map(torch.from_numpy, (heat_maps(images, cam), mask_maps(images, mask))), made]

        figure = Figure(figsize=(11, 5), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(2, 3))
        above, below, chart = (figure.add_subplot(grid[at]) for at in ((0, 0), (1, 0), (slice(None), 1)))
        draw_sheet(above, torch.stack([told[0], untold[0]]), rows=("fine-tuning\nand ID", "OOD"))
        above.set_title("The background's colour tells the digit; out of distribution it does not.", fontsize=9.5)
        headings = ("image", "relevance", "mask", "counterfactual")
        draw_sheet(below, torch.stack(step, dim=1), headings)
        below.set_xlabel("On counterfactual images the features are held to what they were before.", fontsize=9.5)
        draw_tradeoff(chart, {SPOKEN.get(name, name): points for name, points in curves(rows, ID).items()})
        chart.set_title("Accuracy where the colour tells (ID) and where it does not (OOD)", fontsize=9.5)
        figure.savefig(path, dpi=120)


def markdown(rows: Sequence[TableRow]) -> str:
    """The comparison: means over the seeds, ± their standard deviation."""
    start = {row.seed: row for row in rows if row.method == "zero-shot"}
    lines = []
    for method, group in grouped(rows).items():
        cells = [method, *(spread([row.accuracy[name] for row in group]) for name in (ID, OOD))]
        for name in (ID, OOD):
            gains = [row.accuracy[name] - start[row.seed].accuracy[name] for row in group]
            cells.append("" if method == "zero-shot" else f"{statistics.mean(gains):+.1f}")
        compared = method not in ("zero-shot", "ft", CEILING) and not method.startswith("fd")
        above = [row.accuracy[OOD] - on_curve(rows, row) for row in group] if compared else []
        lines.append([*cells, spread(above, signed=True) if above else ""])
    return markdown_table(("method", "ID %", "OOD %", "ID gain", "OOD gain", "OOD − FD at equal ID"), lines)


def on_curve(rows: Sequence[TableRow], at: TableRow) -> float:
    """OOD accuracy at the ID accuracy of ``at``, on the same seed's line through zero-shot, FD's weights and FT."""
    known = [row for row in rows if row.seed == at.seed and row.method.split()[0] in ("zero-shot", "fd", "ft")]
    points = sorted((row.accuracy[ID], row.accuracy[OOD]) for row in known)
    x = min(max(at.accuracy[ID], points[0][0]), points[-1][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise AssertionError("x lies between the first and the last point")
