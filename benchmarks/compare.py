"""An old report against a new one, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from maskcf_fast.core.errors import UserError

OUT_OF_TIME = ("needs about", "the time was over")  # how a cell begins that was left out, not broken
LEAST = 0.05  # a difference below this is noise, however little the rounds differed
WHAT = ("arch", "op", "case", "size", "batch", "method", "order", "run", "precision", "name")  # a cell is of

Found = Iterator[tuple[str, dict[str, Any]]]


def cells(report: Any, key: tuple[str, ...] = ()) -> Found:
    """Every dict in a report, by what it is of."""
    if isinstance(report, dict):
        key += tuple(str(report[name]) for name in WHAT if name in report)
        yield ", ".join(key), report
        for name, value in report.items():
            yield from cells(value, (*key, name))
    elif isinstance(report, list):
        for value in report:
            yield from cells(value, key)


def figures(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """ms and its interquartile range, by what was measured."""
    return {name: (cell["ms"], cell["iqr_ms"]) for name, cell in cells(report) if "iqr_ms" in cell}


def failures(report: dict[str, Any]) -> set[str]:
    """What was tried and did not come out right: checks that failed, and what could not run."""
    failed = set()
    for name, cell in cells({key: value for key, value in report.items() if key != "loader"}):  # needs other packages
        if (check := cell.get("check", "ok")) != "ok":
            failed.add(f"{name}: {check}")
        if not (reason := cell.get("not_measured", OUT_OF_TIME[0])).startswith(OUT_OF_TIME):
            failed.add(f"{name}: {reason}")
    return failed


def check_comparable(old: Any, device: str, threads: int) -> None:
    """Raise unless times on ``device`` can be held against an old report's.

    Raises:
        UserError: It is no report, or of another device or number of threads.
    """
    environment = old.get("environment") if isinstance(old, dict) else None
    if not isinstance(environment, dict) or not {"device", "threads"} <= environment.keys():
        raise UserError('the old report has no "environment" with device and threads: it is none of benchmarks.report')
    for name, now in (("device", device), ("threads", threads)):
        if environment[name] != now:
            raise UserError(f"the old report is of {name} {environment[name]}, this is {now}: compare like with like")


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines ``new/old`` for every cell that both have, and whether anything is worse.

    Worse is a time beyond the noise (both interquartile ranges together, and at least 5 % of the old time), one that
    is no number, and whatever fails that did not. Cells that only one report has are named; they are no regression.

    Raises:
        UserError: The reports are of different devices or have no cell in common.
    """
    check_comparable(old, new["environment"]["device"], new["environment"]["threads"])
    ours, theirs = figures(new), figures(old)
    if theirs and not ours.keys() & theirs.keys():
        raise UserError("the reports have no cell in common: measure the same sections for as many minutes")
    lines, regressed = [], False
    for name in theirs:
        if name not in ours:
            lines.append(f"{name}: only in the old report")
            continue
        (after, spread), (before, old_spread) = ours[name], theirs[name]
        noise = max(LEAST * before, math.hypot(spread, old_spread))
        slower = not after - before <= noise
        regressed |= slower
        mark = "  REGRESSION" if slower else "  faster" if before - after > noise else ""
        lines.append(f"{name}: {after / before:.3f} ({before:.4g} -> {after:.4g} ms, noise {noise / before:.0%}){mark}")
    lines += [f"{name}: only in the new report" for name in ours if name not in theirs]
    broken = sorted(failures(new) - failures(old))
    lines += [f"{what}  REGRESSION" for what in broken]
    return lines, regressed or bool(broken)
