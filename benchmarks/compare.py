"""An old report against a new one, cell by cell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

OUT_OF_TIME = ("needs about", "the time was over")  # how a cell begins that was left out, not broken
LEAST = 0.05  # a difference below this is noise, however little the rounds differed
VARIANT = ("method", "order", "run", "precision")

Figures = dict[tuple[str, ...], tuple[float, float]]  # ms and its interquartile range, by what was measured


def figures(report: dict[str, Any]) -> Figures:
    """Every time in a report."""
    return {key: (found["ms"], found["iqr_ms"]) for key, found in _figures(report) if "ms" in found}


def _figures(report: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    for cell in report.get("step", {}).get("cells", []):
        yield ("step", *(str(cell[k]) for k in ("arch", "batch", *VARIANT))), cell
    for row in report.get("ops", {}).get("rows", []):
        for name, found in row.get("variants", {}).items():
            yield ("op", *(str(row[k]) for k in ("op", "case", "size", "batch")), name), found
    breakdown = report.get("breakdown", {})
    for phase in breakdown.get("phases", []):
        yield ("phase", *(str(breakdown.get(k)) for k in ("arch", "batch", "precision")), phase["name"]), phase


def failures(report: dict[str, Any]) -> set[str]:
    """What was tried and did not come out right: checks that failed, and variants that could not run."""
    checks = [(check["what"], check["status"]) for check in report.get("correctness", [])]  # of older reports
    failed = set()
    for cell in report.get("step", {}).get("cells", []):
        name = ", ".join(str(cell[k]) for k in ("arch", *VARIANT))
        checks.append((name, cell.get("check", "ok")))
        reason = cell.get("not_measured")
        if reason is not None and not reason.startswith(OUT_OF_TIME):
            failed.add(f"{name}: {reason}")
    for row in report.get("ops", {}).get("rows", []):
        for name, found in row.get("variants", {}).items():
            checks.append((f"{row['op']}, {row['case']}, {row['size']}, {name}", found.get("check", "ok")))
    failed |= {f"{what}: {status}" for what, status in checks if status.startswith("FAILED")}
    for name in ("step", "breakdown", "scaling", "ops"):  # the loader may be missing: it needs other packages
        if "not_measured" in (section := report.get(name, {})):
            failed.add(f"{name}: {section['not_measured']}")
    return failed


def check_comparable(old: dict[str, Any], device: str, threads: int) -> None:
    """Raise unless times on ``device`` can be held against an old report's.

    Raises:
        ValueError: It is no report, or of another device or number of threads.
    """
    environment = old.get("environment") if isinstance(old, dict) else None
    if not isinstance(environment, dict) or not {"device", "threads"} <= environment.keys():
        raise ValueError('the old report has no "environment" with device and threads: it is none of benchmarks.report')
    for name, now in (("device", device), ("threads", threads)):
        if environment[name] != now:
            raise ValueError(f"the old report is of {name} {environment[name]}, this is {now}: compare like with like")


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines ``new/old`` for every cell that both have, and whether anything is worse.

    Worse is a time beyond the noise (both interquartile ranges together, and at least 5 % of the old time), one that
    is no number, and whatever fails that did not. Cells that only one report has are named; they are no regression.

    Raises:
        ValueError: The reports are of different devices or have no cell in common.
    """
    check_comparable(old, new["environment"]["device"], new["environment"]["threads"])
    ours, theirs = figures(new), figures(old)
    if theirs and not ours.keys() & theirs.keys():
        raise ValueError("the reports have no cell in common: measure the same sections for as many minutes")
    lines, regressed = [], False
    for key in theirs:
        name = ", ".join(key)
        if key not in ours:
            lines.append(f"{name}: only in the old report")
            continue
        (after, spread), (before, old_spread) = ours[key], theirs[key]
        noise = max(LEAST * before, math.hypot(spread, old_spread))
        slower = not after - before <= noise
        regressed |= slower
        mark = "  REGRESSION" if slower else "  faster" if before - after > noise else ""
        lines.append(f"{name}: {after / before:.3f} ({before:.4g} -> {after:.4g} ms, noise {noise / before:.0%}){mark}")
    lines += [f"{', '.join(key)}: only in the new report" for key in ours if key not in theirs]
    broken = sorted(failures(new) - failures(old))
    lines += [f"{what}  REGRESSION" for what in broken]
    return lines, regressed or bool(broken)
