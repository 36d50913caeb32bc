"""The report's charts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure

CHARTS = ("step.png", "scaling.png", "breakdown.png")
BLUE, GREY, ORANGE = "#2f6db3", "#9aa1a9", "#d9772b"
PALETTE = ("#9aa1a9", "#2f6db3", "#d9772b", "#5aa5d6", "#8a6fb0", "#57a773", "#2e7d4f", "#c9ced4")


def charts(report: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by name, of what the report holds."""
    makers: tuple[Callable[[dict[str, Any]], Figure | None], ...] = (_step, _scaling, _breakdown)
    found = {}
    for name, make in zip(CHARTS, makers, strict=True):
        if (figure := make(report)) is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=140, bbox_inches="tight", metadata={"Software": None})
            found[name] = buffer.getvalue()
    return found


def _step(report: dict[str, Any]) -> Figure | None:
    """Images per second by variant, a panel per model and batch size."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in report.get("step", {}).get("cells", []):
        if "ms" in cell:
            groups.setdefault((cell["arch"], cell["batch"]), []).append(cell)
    if not groups:
        return None
    heights = [len(cells) + 1.5 for cells in groups.values()]
    figure = Figure(figsize=(8, 0.28 * sum(heights) + 0.6))
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights, "hspace": 0.5})[:, 0]
    for ax, ((arch, batch), cells) in zip(axes, groups.items(), strict=True):
        names = [_label(cell) for cell in cells]
        colours = [GREY if cell["order"] == "paper" else BLUE if cell["run"] == "eager" else ORANGE for cell in cells]
        bars = ax.barh(names, [cell["images_s"] for cell in cells], color=colours)
        ax.bar_label(bars, [_speed(cell) for cell in cells], padding=3, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.2)
        ax.set_title(f"{arch}, {batch} images: images/s (× as fast as the paper's order)", fontsize=9, loc="left")
        _plain(ax)
    return figure


def _label(cell: dict[str, Any]) -> str:
    order = {"paper": ", paper's order", "one graph": ", one graph"}.get(cell["order"], "")
    run = "" if cell["run"] == "eager" else f", {cell['run']}"
    return f"{cell['method']}{order}{run}, {cell['precision']}"


def _speed(cell: dict[str, Any]) -> str:
    if cell["check"] != "ok":
        return f"{cell['images_s']:.3g}  FAILED"
    times = cell["times_as_fast"].get("paper")
    return f"{cell['images_s']:.3g}" + (f"  ({times:.2f} ×)" if times else "")


def _scaling(report: dict[str, Any]) -> Figure | None:
    """Time and memory over batch, tokens and depth, on logarithmic axes."""
    names = [name for name in ("batch", "tokens", "depth") if report.get("scaling", {}).get(name, {}).get("points")]
    if not names:
        return None
    figure = Figure(figsize=(3.4 * len(names), 5.6), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        series = report["scaling"][name]
        for row, (unit, label, scale) in enumerate((("ms", "ms per step", 1.0), ("bytes", "peak memory, MB", 1e-6))):
            ax = axes[row, column]
            for order, text, colour in (("step", "this package", BLUE), ("paper", "paper's order", GREY)):
                key = f"{order}_{unit}"
                points = [(p["x"], p[key] * scale) for p in series["points"] if p.get(key)]
                if points:
                    power = series["exponents"].get(key)
                    label_ = text if power is None else f"{text}: ∝ x^{power:.2f}"
                    ax.plot(*zip(*points, strict=True), "o-", color=colour, label=label_, markersize=4)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ticks = [p["x"] for p in series["points"]]
            ax.set_xticks(ticks, [str(x) for x in ticks])
            ax.minorticks_off()
            ax.set_xlabel(name)
            ax.set_ylabel(label)
            if ax.lines:
                ax.legend(fontsize=7, frameon=False)
            _plain(ax)
    return figure


def _breakdown(report: dict[str, Any]) -> Figure | None:
    """Shares of the phases in a step's time and arithmetic, as stacked bars."""
    found = report.get("breakdown", {})
    if "phases" not in found:
        return None
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    ax = figure.subplots()
    rows = list(_bars(found))
    for i, phase in enumerate(found["phases"]):
        for y, (_, key) in enumerate(rows):
            total = sum(p[key] for p in found["phases"])
            left = sum(p[key] for p in found["phases"][:i]) / total
            share = phase[key] / total
            ax.barh(y, share, left=left, color=PALETTE[i], label=phase["name"] if y == 0 else None)
            if share > 0.04:
                ax.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [label for label, _ in rows])
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xticks([])
    ax.set_title(f"{found['arch']}, {found['batch']} images, {found['method']}, {found['precision']}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    _plain(ax)
    return figure


def _bars(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"time\n{sum(p['ms'] for p in found['phases']):.0f} ms", "ms"
    yield f"arithmetic\n{sum(p['flops'] for p in found['phases']) / found['forward']:.2f} F", "flops"


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
