"""The table of `benchmarks.ops` as Markdown that also reads as text, and the targets it is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

Row = dict[str, Any]  # of the results: a case at a size and a batch

NOTES = """\
ms: median over the rounds, which take the variants in turn, and the interquartile range. GB/s: every argument read
once and every result written once, by the time. Of a copy: speed against `torch.empty_like(x).copy_(x)` of as many
bytes in the same rounds; of bandwidth: against `y.copy_(x)`, with `y` there already (on a CPU, the system's handing out
memory can take most of the former's time). × as fast: against the paper's formula (a mask repeated to pixels,
multiplied), against the better plain PyTorch (eager), and against that compiled. MB: the highest point of memory during
a call above its arguments, results included. `auto` takes the implementation in bold.\
"""
COLUMNS = (
    *("model", "N", "variant", "ms", "± IQR", "GB/s", "of a copy", "of bandwidth"),
    *("× paper", "× eager", "× compiled", "MB"),
)
LABELS = {"paper": "paper's formula", "eager": "eager", "compiled": "torch.compile"}


def targets(rows: Sequence[Row], kind: str) -> list[dict[str, str]]:
    """What the ops are meant to reach, what was measured, and ``"met"``, ``"missed"`` or ``"not measured"``.

    Held against them is what ``auto`` takes: for the refill at the largest batch of each size, since a small one
    waits for the launch; for relevance at every batch.

    Args:
        rows: Rows of the results.
        kind: ``"cpu"`` or ``"cuda"``.
    """
    rows = [row for row in rows if "variants" in row]
    refills = [row for row in rows if row["op"] == "counterfactual_refill" and row["dtype"] == "float32"]
    refills = [row for row in refills if row["batch"] == max(r["batch"] for r in refills)]
    relevance = [row for row in rows if row["op"] == "attention_relevance" and row["size"].startswith("ViT-L/14")]

    def share(row: Row) -> float | None:
        return _auto(row).get("copy_share")

    def times(row: Row, other: str) -> float | None:
        return _auto(row).get("times_as_fast", {}).get(other)

    def memory(row: Row) -> float | None:
        part, whole = (found.get("peak_bytes") for found in (_auto(row), row["variants"]["eager"]))
        return part / whole if part is not None and whole else None

    refill, layer = "`counterfactual_refill`, float32", "`attention_relevance`, ViT-L/14"
    return [
        _target(f"{refill}: on a GPU, 90 % of a copy's speed", refills if kind == "cuda" else [], share, 0.9, "%"),
        _target(f"{refill}: 5 × as fast as the paper's formula", refills, partial(times, other="paper"), 5, "×"),
        _target(f"{layer}: at most 10 % of the maps' memory", relevance, memory, 0.1, "%", most=True),
        _target(f"{layer}: not slower than with maps", relevance, partial(times, other="eager"), 1, "×"),
    ]


def _auto(row: Row) -> dict[str, Any]:
    """What was found about the implementation that ``auto`` takes."""
    return row["variants"][row["auto"]]


def _target(
    name: str, rows: Sequence[Row], value: Callable[[Row], float | None], bound: float, unit: str, most: bool = False
) -> dict[str, str]:
    """A target that the value of every row must reach or, with ``most``, stay within."""
    if failed := [f"{row['size']}, N={row['batch']}" for row in rows if _auto(row).get("check", "ok") != "ok"]:
        return {"target": name, "measured": f"FAILED at {'; '.join(failed)}", "state": "missed"}
    values = [x for row in rows if (x := value(row)) is not None]
    if not values:
        return {"target": name, "measured": "", "state": "not measured"}
    met = max(values) <= bound if most else min(values) >= bound
    low, high = (f"{(100 if unit == '%' else 1) * x:.3g}" for x in (min(values), max(values)))
    measured = f"{low if low == high else f'{low} to {high}'} {unit}"
    if len(values) > 1:
        measured += f" ({len(values)} rows)"
    return {"target": name, "measured": measured, "state": "met" if met else "missed"}


def to_markdown(results: dict[str, Any]) -> str:
    """The results of `benchmarks.ops.measure` as a page."""
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    copy = results["copy_gb_s"]
    lines = [
        f"# Ops on {env['device']}",
        "",
        f"{env['threads']} threads of {env['cores']} cores, {versions}, {env['platform']}, load average "
        f"{env['load']:.1f} at the start. A copy moves "
        f"{copy['copy']:.1f} GB/s into new memory and {copy['copy in place']:.1f} GB/s into memory that is there. "
        f"Measured in {results['seconds']:.0f} s by",
        "",
        "```bash",
        env["command"],
        "```",
        "",
        NOTES,
        "",
        "## Targets",
        "",
        *_table(("target", "measured", "state"), [tuple(t.values()) for t in results["targets"]], left=3),
    ]
    for title in dict.fromkeys((row["op"], row["case"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["op"], row["case"]) == title]
        cells = [cell for row in rows for cell in _cells(row)]
        lines += ["", f"## `{title[0]}`: {title[1]}", ""]
        lines += _table(COLUMNS, cells, left=3) if cells else ["Not measured."]
    absent = list(_absent(results["rows"]))
    if absent:
        lines += ["", "## Not available", "", *absent]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> Iterator[tuple[str, ...]]:
    """A line of the table for every variant that ran, a copy for comparison first."""
    if "variants" not in row:
        return
    where = (row["size"], str(row["batch"]))
    for label, ms in (("copy", row["copy_ms"]), ("copy in place", row["copy_in_place_ms"])):
        yield (*where, label, _number(ms), "", f"{row['moved_bytes'] / ms / 1e6:.1f}", *[""] * 6)
    for name, found in row["variants"].items():
        label = f"**{name}**" if name == row["auto"] else LABELS.get(name, name)
        if "ms" in found:
            ratios = found.get("times_as_fast", {})
            peak = found["peak_bytes"]
            yield (
                *where,
                label,
                _number(found["ms"]),
                _number(found["iqr_ms"]),
                f"{found['gb_s']:.1f}",
                f"{found['copy_share']:.0%}",
                f"{found['bandwidth_share']:.0%}",
                *(f"{ratios[other]:.2f}" if other in ratios else "" for other in ("paper", "eager", "compiled")),
                "" if peak is None else f"{peak / 1e6:.1f}",
            )
        elif "check" in found:
            yield (*where, label, found["check"], *[""] * 8)


def _absent(rows: Sequence[Row]) -> Iterator[str]:
    """What has no figures and why; a reason of an implementation as such is given once per op."""
    found: dict[tuple[str, str], dict[str, None]] = {}  # by reason and what it is about; a dict keeps the order
    for row in rows:
        at = f"{row['op']} ({row['case']}, {row['size']}, N={row['batch']})"
        if "not_measured" in row:
            found.setdefault((row["not_measured"], ""), {})[at] = None
        for name, variant in row.get("variants", {}).items():
            if "unavailable" in variant:
                place = row["op"] if name in ("cuda", "triton", "cpu") else at
                found.setdefault((variant["unavailable"], f"{LABELS.get(name, name)} of "), {})[place] = None
    for (reason, what), places in found.items():
        yield f"- {what}{', '.join(places)}: {reason}"


def _number(ms: float) -> str:
    """Three digits, without an exponent."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" if ms >= 0.001 else f"{ms:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table padded to read as text; the first ``left`` columns to the left, numbers to the right."""
    # FAILED and its reason are wider than any number: they do not widen the column.
    widths = [max(len(c) for c in column if not c.startswith("FAILED")) for column in zip(header, *rows, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in (header, rule, *rows)
    ]
    return [f"| {' | '.join(row)} |" for row in padded]
