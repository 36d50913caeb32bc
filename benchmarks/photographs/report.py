"""``python -m benchmarks.photographs.report``: from runs to committed results, and from those to the page.

With ``--runs DIR``, the result files of a finished or unfinished benchmark become
``benchmarks/results/photographs/TASK.json``, or ``TASK-224px.json`` where the images have other than the usual 112
pixels; in any case the figures in ``docs/photographs.md`` and its pictures are made anew from what is there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from maskcf_fast.core.command import command
from maskcf_fast.core.errors import UserError
from maskcf_fast.core.files import atomic_write, read_json
from maskcf_fast.visualization.plots import COLOURS, MARKERS

from ..measure import environment
from ..tables import table
from . import analysis
from .analysis import SHIFTED, Model, advantages, choose, grouped, interval, models, paired
from .run import Options as Run

ROOT = Path(__file__).parents[2]
MARKS = ("<!-- figures -->", "<!-- /figures -->")
NOTHING = ["Not measured yet."]
TITLES = {"birds-mammals": "Two classes: birds and mammals", "five-kinds": "Five classes"}
CURVES = {
    "fd": "feature distillation (FD)", "object-single": "object mask", "true-object": "true object's mask",
    "context-single": "context mask", "random-single": "random mask", "wise-ft": "WiSE-FT",
}  # fmt: skip
NUMBERED = ("fd", "object-single", "wise-ft")  # whose weights the picture shows
POINTS = {"zero-shot": ("before", "o"), "ft": ("FT", "s"), "ft-balanced": ("FT, balanced data", "*")}


@dataclass(frozen=True)
class Options:
    """Make the page of the photographs from results."""

    runs: Path | None = None
    """--out of python -m benchmarks.photographs.run, whose results are taken first."""
    results: Path = ROOT / "benchmarks/results/photographs"
    """Where results are kept."""
    page: Path = ROOT / "docs/photographs.md"
    """The page; the pictures lie in the folder of its name beside it."""


def collect(runs: Path, task: str) -> dict[str, Any]:
    """All result files of a task, with where they were measured.

    Raises:
        UserError: They were not measured with the same settings.
    """
    files = [read_json(path) for path in sorted(runs.glob(f"{task}-seed*/results/*.json"))]
    settings = [{name: value for name, value in file["about"].items() if name != "images"} for file in files]
    if different := [s for s in settings if s != settings[0]]:
        raise UserError(f"{runs} holds results of other settings beside each other: {different[0]}, {settings[0]}")
    images = {str(file["seed"]): file["about"]["images"] for file in files}
    kept = [{name: file[name] for name in ("row", "seed", "rows", "maps") if name in file} for file in files]
    about = {**(settings[0] if settings else {}), "images": images}
    return {"about": about, "environment": environment(torch.device("cpu")), "files": kept}


def section(results: dict[str, Any], picture: str) -> list[str]:
    """A task's part of the page."""
    about, found = results["about"], models(results["files"])
    size = "" if about["image_size"] == Run.image_size else f", at {about['image_size']} pixels"
    lines = ["", f"## {TITLES[about['task']]}{size}", "", f"![ID accuracy against the shifted sets]({picture})", ""]
    lines += ["Accuracy in per cent: mean over seeds, ± standard deviation.", "", *accuracies(found), ""]
    lines += ["### Against FD at equal ID accuracy", "", *against_fd(found), ""]
    lines += ["### Against FD of the same weight", "", *same_weight(found), ""]
    lines += ["### Chosen by validation", "", *chosen(found), ""]
    if watched := [file for file in results["files"] if "maps" in file]:
        lines += ["### The map as a mask", "", *map_figures(watched), ""]
    return [*lines, where(results), ""]


def accuracies(found: Sequence[Model]) -> list[str]:
    """Every model."""
    rows = []
    for name, group in grouped(found).items():
        cells = [[getattr(m, measure) for m in group] for measure in ("id", *SHIFTED, "val")]
        rows.append((name, str(len(group)), *(f"{statistics.mean(c):.1f}{_deviation(c)}" for c in cells)))
    return table(("method, weight", "seeds", "ID", *SHIFTED, "validation"), rows, left=1)


def against_fd(found: Sequence[Model]) -> list[str]:
    """Every method, in points above FD's line at its own ID accuracy; FD's weights above that of the others."""
    names: dict[str, Any] = {}
    for name, group in grouped(found).items():
        method = group[0].method
        if method in (analysis.START, analysis.TUNED):
            continue
        if sum(m.method == method and m.strength != group[0].strength for m in found):
            names.setdefault(f"{method}, all weights", lambda m, method=method: m.method == method)
        names[name] = lambda m, name=name: m.name == name
    rows = []
    for name, picked in names.items():
        values = [advantages(found, picked, measure) for measure in SHIFTED]
        if values[0]:
            rows.append((name, str(len(values[0])), *(str(interval(v)) for v in values)))
    return table(("method, weight", "seeds", *SHIFTED), rows, left=1) if rows else NOTHING


def same_weight(found: Sequence[Model]) -> list[str]:
    """Every method less FD of the same weight, seed by seed."""
    groups, rows = grouped(found), []
    for name, own in groups.items():
        reference = groups.get(f"{analysis.REFERENCE} {name.rpartition(' ')[2]}", [])
        differences = [paired(own, reference, measure) for measure in ("id", *SHIFTED)]
        if own[0].method != analysis.REFERENCE and differences[0]:
            rows.append((name, str(len(differences[0])), *(str(interval(d)) for d in differences)))
    return table(("method, weight", "seeds", "ID", *SHIFTED), rows, left=1) if rows else NOTHING


def chosen(found: Sequence[Model]) -> list[str]:
    """What validation chooses of each method's weights, and how far it lies above what it chooses of FD's."""
    reference = choose(found, analysis.REFERENCE)
    rows = []
    found = [m for m in found if m.strength is not None or m.method == analysis.TUNED]
    for method in sorted({m.method for m in found} - {analysis.TUNED}):
        own = choose(found, method)
        strengths = ", ".join(f"{m.strength:g}" for m in own)
        means = [f"{statistics.mean(getattr(m, measure) for m in own):.1f}" for measure in ("id", *SHIFTED)]
        differences = [paired(own, reference, measure) for measure in ("id", "swapped", "opposite")]
        above = ["" if method == analysis.REFERENCE or not d else str(interval(d)) for d in differences]
        rows.append((method, str(len(own)), strengths, *means, *above))
    columns = ("method", "seeds", "weights chosen", "ID", *SHIFTED, "ID − FD", "swapped − FD", "opposite − FD")
    return table(columns, rows, left=1) if rows else NOTHING


def map_figures(watched: Sequence[dict[str, Any]]) -> list[str]:
    """Maps cut at the paper's threshold, before training, after an epoch and at its end; per cent, means over seeds."""
    rows = []
    for row in sorted({file["row"] for file in watched}):
        files = [file for file in watched if file["row"] == row]
        steps = [entry["step"] for entry in files[0]["maps"]]
        for step in dict.fromkeys((steps[0], steps[1], steps[-1])):
            entries = [entry["maps"] for file in files for entry in file["maps"] if entry["step"] == step]
            for name in entries[0]:
                cells = [statistics.mean(e[name][k] for e in entries) for k in entries[0][name]]
                rows.append((row.replace(":", " "), str(step), name, *(f"{cell:.0f}" for cell in cells)))
    columns = ("trained by", "step", "map", "masked", "of the object masked", "of the mask object", "overlap")
    return table(columns, rows, left=3)


def where(results: dict[str, Any]) -> str:
    """Machine, versions and settings."""
    about, env = results["about"], results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return (
        f"{env['device']}, {env['cores']} cores, one thread a process; {versions}; {about['epochs']} epochs at "
        f"{about['image_size']} px in {about['precision']}."
    )


def plot(found: Sequence[Model], path: Path) -> None:
    """ID accuracy against each of the others: means over seeds, bands of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, measure in zip(figure.subplots(2, 2).flat, SHIFTED, strict=True):
        for i, (method, label) in enumerate(CURVES.items()):
            groups = [g for g in grouped(found).values() if g[0].method == method]
            if not groups:
                continue
            x, y, e = (np.array(column) for column in zip(*(_point(g, measure) for g in groups), strict=True))
            style = "--" if method == "wise-ft" else "-"
            axes.plot(x, y, style, marker=MARKERS[i], color=COLOURS[i], markersize=5, label=label)
            if len(x) > 1:
                axes.fill_between(x, y - e, y + e, color=COLOURS[i], alpha=0.12, linewidth=0)
            else:
                axes.errorbar(x, y, e, color=COLOURS[i], linewidth=0.8)
            for group, at in zip(groups, zip(x, y, strict=True), strict=True):
                if method in NUMBERED and group[0].strength is not None:
                    text = f"{group[0].strength:g}"
                    axes.annotate(text, at, (5, 4), textcoords="offset points", fontsize=8, color=COLOURS[i])
        for method, (label, marker) in POINTS.items():
            if group := [m for m in found if m.method == method]:
                x0, y0, e0 = _point(group, measure)
                axes.errorbar(x0, y0, e0, fmt=marker, color="black", markersize=7, linewidth=0.8, label=label)
        axes.set(xlabel="ID accuracy (%)", title=f"{measure} (%)")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def page(results: Path, text: str, folder: str) -> str:
    """The page with the figures of all tasks that there are results of between its marks."""
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    lines = [line for path in measured(results) for line in section(read_json(path), f"{folder}/{path.stem}.png")]
    return "\n".join([before + MARKS[0], *(lines or NOTHING), MARKS[1]]) + after


def require_same_settings(path: Path, about: dict[str, Any]) -> None:
    """Raise a UserError where other settings' results would be lost."""
    if not path.is_file():
        return
    kept = read_json(path)["about"]
    if other := [name for name in about if name != "images" and about[name] != kept[name]]:
        raise UserError(f"{path} is of {other[0]} {kept[other[0]]!r}, not {about[other[0]]!r}: choose other --results")


def measured(results: Path) -> Iterator[Path]:
    """The result files, in the page's order."""
    for task in TITLES:
        yield from (path for path in (results / f"{task}.json",) if path.is_file())
        others = results.glob(f"{task}-[0-9]*px.json")
        yield from sorted(others, key=lambda path: int(path.stem[len(task) + 1 : -2]))


def _point(group: Sequence[Model], measure: str) -> tuple[float, float, float]:
    values = [getattr(m, measure) for m in group]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(m.id for m in group), statistics.mean(values), error


def _deviation(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""


@command()
def main(arguments: list[str]) -> None:
    """Collect what is asked for, and write the page."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.photographs.report")
    if options.runs:
        collected = {task: collect(options.runs, task) for task in TITLES}
        if not any(content["files"] for content in collected.values()):
            raise UserError(f"{options.runs} holds no results of {' or '.join(TITLES)}: give --out of the benchmark")
        for task, content in collected.items():
            if content["files"]:
                size = content["about"]["image_size"]
                path = options.results / f"{task}{'' if size == Run.image_size else f'-{size}px'}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                require_same_settings(path, content["about"])
                atomic_write(path, (json.dumps(content) + "\n").encode())
    for path in measured(options.results):
        plot(models(read_json(path)["files"]), options.page.with_suffix("") / f"{path.stem}.png")
    text = page(options.results, options.page.read_text(), options.page.stem)
    atomic_write(options.page, text.encode())


if __name__ == "__main__":
    raise SystemExit(main())
