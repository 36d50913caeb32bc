"""An old report against a new one, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

LEAST = 0.05  # a difference below this is noise, however little the rounds differed

Figures = dict[tuple[str, ...], tuple[float, float]]  # ms and its interquartile range, by what was measured


def figures(report: dict[str, Any]) -> Figures:
    """Every time in a report."""
    return dict(_figures(report))


def _figures(report: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], tuple[float, float]]]:
    for cell in report.get("step", {}).get("cells", []):
        if "ms" in cell:
            key = ("step", *(str(cell[k]) for k in ("arch", "batch", "method", "order", "run", "precision")))
            yield key, (cell["ms"], cell["iqr_ms"])
    for row in report.get("ops", {}).get("rows", []):
        for name, found in row.get("variants", {}).items():
            if "ms" in found:
                yield (
                    ("op", row["op"], row["case"], row["size"], str(row["batch"]), name),
                    (found["ms"], found["iqr_ms"]),
                )
    for phase in report.get("breakdown", {}).get("phases", []):
        yield ("phase", phase["name"]), (phase["ms"], phase["iqr_ms"])


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines ``new/old`` for every cell that both have, and whether any is slower beyond the noise.

    The noise is both interquartile ranges together, and at least 5 % of the old time. Cells that only one report has
    are named; they are no regression.

    Raises:
        ValueError: The reports are of different devices, whose times say nothing about each other.
    """
    devices = [report["environment"]["device"] for report in (new, old)]
    if devices[0] != devices[1]:
        raise ValueError(f"the new report is of {devices[0]}, the old one of {devices[1]}: compare on one device")
    ours, theirs = figures(new), figures(old)
    lines, regressed = [], False
    for key in theirs:
        name = ", ".join(key)
        if key not in ours:
            lines.append(f"{name}: only in the old report")
            continue
        (after, spread), (before, old_spread) = ours[key], theirs[key]
        noise = max(LEAST * before, math.hypot(spread, old_spread))
        slower = after - before > noise
        regressed |= slower
        mark = "  REGRESSION" if slower else "  faster" if before - after > noise else ""
        lines.append(f"{name}: {after / before:.3f} ({before:.4g} -> {after:.4g} ms, noise {noise / before:.0%}){mark}")
    lines += [f"{', '.join(key)}: only in the new report" for key in ours if key not in theirs]
    return lines, regressed
