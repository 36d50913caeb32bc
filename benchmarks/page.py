"""The report as a page, its targets, and the README's section, all from what ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import ops
from .tables import heading, machine, number, table, target, target_table

Cell = dict[str, Any]
Report = dict[str, Any]

MAIN = "object-single"
NOTES = """\
A step is zeroing, backward, clipping and fused AdamW; variants of a model and a batch size take turns, round by round.
ms: median over the rounds and interquartile range. F: one plain forward pass of the batch, every token in every block;
products counted by `torch.utils.flop_counter`. Utilisation: those, by the time, of the rate of a large square product
in the same precision. × paper: median over the rounds of the ratio within a round, against the paper's order written
plainly, at the same precision, compiled, in TF32 and in fp32. MB: highest point during a step above weights, gradients
and moments. Check: against the paper's order in fp32 (eager), the same in eager mode (compiled), or the kernels that a
graph replays.\
"""
PAPER = {"paper": "× paper", "paper compiled": "compiled", "paper tf32": "TF32", "paper fp32": "fp32"}


def targets(report: Report) -> list[dict[str, str]]:
    """What the step is meant to reach, what was measured, and ``"met"``, ``"missed"`` or ``"not measured"``."""
    kind = report["environment"]["kind"]
    cells = [c for c in report.get("step", {}).get("cells", []) if "ms" in c and c["check"] == "ok"]
    steps = [c for c in cells if c["method"] == MAIN and c["order"] == "two passes"]

    def times(precision: str, other: str, run: str | None = None) -> list[tuple[str, float]]:
        chosen = [c for c in steps if c["precision"] == precision and run in (None, c["run"])]
        return [(_where(c), c["times_as_fast"][other]) for c in chosen if other in c["times_as_fast"]]

    over_random = [(_where(c), 1 / c["times_as_fast"]["random"]) for c in steps if "random" in c["times_as_fast"]]
    found = [target("CAM-masked step by random-mask step: at most 1.2", over_random, 1.2, most=True)]
    if kind == "cuda":
        found += [
            target(f"against the paper's order, both in {p}: 2.5 ×", times(p, "paper"), 2.5) for p in ("fp32", "bf16")
        ]
        found.append(target("bf16 against the paper's order in fp32: 10 ×", times("bf16", "paper fp32"), 10))
        for arch in ("ViT-B/16", "ViT-L/14"):  # what a model reaches at the batch and run that suit it
            used = [(_where(c), c["utilisation"]) for c in steps if (c["arch"], c["precision"]) == (arch, "bf16")]
            best = [max(used, key=lambda pair: pair[1])] if used else []
            found.append(target(f"utilisation in bf16, {arch}: at least 0.5", best, 0.5))
    else:
        amx = times("bf16", "paper fp32", "eager") if _has_amx() else []
        found += [
            target("against the paper's order, fp32: 1.2 ×", times("fp32", "paper", "eager"), 1.2),
            target("bf16 against the paper's order in fp32, with AMX: 2.5 ×", amx, 2.5),
            target("on a GPU against the paper's order, equal precision: 2.5 ×", [], 2.5),
            target("on a GPU in bf16 against the paper's order in fp32: 10 ×", [], 10),
            target("on a GPU utilisation in bf16, B/16 and L/14: at least 0.5", [], 0.5),
        ]
    power = report.get("scaling", {}).get("tokens", {}).get("exponents", {}).get("step_bytes")
    slowdown = report.get("loader", {}).get("fed", {}).get("slowdown")
    single = [("memory in tokens: exponent at most 1.1", power, 1.1),
              ("loader-fed step slower than synthetic data: at most 0.05", slowdown, 0.05)]  # fmt: skip
    return [
        *found,
        target("memory at L/14 by the paper order's: at most 0.33", _memory(cells), 1 / 3, most=True),
        *(target(text, [] if x is None else [("", x)], bound, most=True) for text, x, bound in single),
    ]


def _memory(cells: Sequence[Cell]) -> list[tuple[str, float]]:
    """Peak memory of the eager step by the paper order's, at L/14."""
    eager = [c for c in cells if c["method"] == MAIN and c["run"] == "eager" and c["arch"] == "ViT-L/14"]
    paper = {(c["batch"], c["precision"]): c["peak_bytes"] for c in eager if c["order"] == "paper"}
    steps = [c for c in eager if c["order"] == "two passes" and paper.get((c["batch"], c["precision"]))]
    return [(_where(c), c["peak_bytes"] / paper[c["batch"], c["precision"]]) for c in steps if c["peak_bytes"]]


def _where(cell: Cell) -> str:
    run = "" if cell["run"] == "eager" else f", {cell['run']}"
    return f"{cell['arch']}, N={cell['batch']}, {cell['precision']}{run}"


def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def to_markdown(report: Report) -> str:
    """The page."""
    lines = [*heading("Throughput", report), "## Targets", "", *target_table(report["targets"])]
    if "correctness" in report:  # reports of before the variants were checked one by one
        lines += ["", "## Correctness", "", *_correctness(report["correctness"])]
    parts = {"step": _step, "breakdown": _breakdown, "scaling": _scaling, "loader": _loader, "ops": _ops}
    for name, make in parts.items():
        lines += ["", f"## {name.capitalize()}", ""]
        section = report.get(name, {"not_measured": "not asked for"})
        if "not_measured" in section and len(section) == 1:
            lines.append(f"Not measured: {section['not_measured']}.")
        else:
            lines += make(section)
    return "\n".join(lines) + "\n"


def _correctness(rows: Sequence[dict[str, str]]) -> list[str]:
    count = {state: sum(row["status"].startswith(state) for row in rows) for state in ("ok", "FAILED", "not")}
    return [f"{count['ok']} checks passed, {count['FAILED']} FAILED, {count['not']} not checked or not available."]


def _step(section: dict[str, Any]) -> list[str]:
    rates = ", ".join(f"{rate / 1e12:.3g} in {name}" for name, rate in section["matrix_rate"].items())
    columns = ("model", "N", "step", "images/s", "ms", "± IQR", "F", "utilisation", *PAPER.values(), "MB", "check")
    rows: list[tuple[str, ...]] = []
    for c in (c for c in section["cells"] if "ms" in c):
        times = c.get("times_as_fast", {})
        rows.append(
            (
                *(c["arch"], str(c["batch"]), name(c), f"{c['images_s']:.3g}", f"{c['ms']:.1f}", f"{c['iqr_ms']:.1f}"),
                *(number(c["forwards"]), number(c["utilisation"], ".0%")),
                *(number(times.get(other)) for other in PAPER),
                *(number(c["peak_bytes"], ".0f", 1e-6), c["check"]),
            )
        )
    lines = [f"Rate of a large square product: {rates} (TFLOP/s).", "", *NOTES.splitlines(), ""]
    lines += table(columns, rows, left=3)
    absent: dict[str, dict[str, list[str]]] = {}
    for c in (c for c in section["cells"] if "ms" not in c):
        reasons = absent.setdefault(f"{c['arch']}, N={c['batch']}", {})
        reasons.setdefault(c["not_measured"], []).append(name(c))
    if absent:
        lines += ["", "Not measured:", ""]
        lines += [f"- {at}: {'; '.join(what)} ({why})" for at, found in absent.items() for why, what in found.items()]
    return lines


def name(cell: Cell) -> str:
    """A cell's variant in words."""
    order = {"paper": "paper's order", "one graph": "one graph"}.get(cell["order"])
    return ", ".join(filter(None, (cell["method"], order, cell["run"], cell["precision"])))


def _breakdown(section: dict[str, Any]) -> list[str]:
    unit, phases = section["forward"], section["phases"]
    rows: list[tuple[str, ...]] = [
        (p["name"], f"{p['ms']:.1f}", f"{p['iqr_ms']:.1f}", f"{p['flops'] / unit:.3f}",
         "" if p["theory"] is None else f"{p['theory'] / unit:.3f}")
        for p in phases
    ]  # fmt: skip
    total = [sum(p[key] or 0 for p in phases) for key in ("ms", "flops", "theory")]
    rows.append(("all", f"{total[0]:.1f}", "", *(f"{flops / unit:.3f}" for flops in total[1:])))
    where = f"{section['arch']}, {section['batch']} images, {section['method']}, {section['precision']}"
    whole = f"The step without waits between the phases takes {section['whole_ms']:.1f} ms."
    return [f"{where}. {whole}", "", *table(("phase", "ms", "± IQR", "F counted", "F by theory"), rows, left=1)]


def _scaling(section: dict[str, Any]) -> list[str]:
    where = f"{section['arch']}, {section['images']} images, {section['method']}, {section['precision']}"
    rows: list[tuple[str, ...]] = []
    absent: list[str] = []
    keys = ("step_ms", "paper_ms", "step_bytes", "paper_bytes")
    for series in ("batch", "tokens", "depth"):
        found = section.get(series, {"points": [], "exponents": {}})
        for p in found["points"]:
            if "not_measured" in p:
                absent.append(f"- {series} {p['x']}: not measured ({p['not_measured']})")
            else:
                values = (number(p[key], ".1f", 1 if key.endswith("ms") else 1e-6) for key in keys)
                rows.append((series, str(p["x"]), *values))
        rows.append((series, "exponent", *(number(found["exponents"].get(key)) for key in keys)))
    header = ("series", "value", "ms", "ms, paper's order", "MB", "MB, paper's order")
    lines = [f"{where}, where not varied; tokens at half the depth.", "", *table(header, rows, left=2), ""]
    return lines + absent


def _loader(section: dict[str, Any]) -> list[str]:
    if "not_measured" in section:
        lines = [f"Not measured: {section['not_measured']}."]
    else:
        from .loader import to_markdown as loader_markdown  # needs what the loaders need

        lines = loader_markdown(section).rstrip().splitlines()
    fed = section["fed"]
    if "not_measured" in fed:
        return [*lines, "", f"Loader-fed step: {fed['not_measured']}."]
    text = f"{fed['fed_ms']:.1f} ms against {fed['synthetic_ms']:.1f} ms, {fed['slowdown']:+.1%}"
    return [*lines, "", f"A step fed by the loader against one on a batch that is there: {text}."]


def _ops(section: dict[str, Any]) -> list[str]:
    return ops.sections(section, level="###")


def readme_section(report: Report) -> str:
    """The README's performance section, between its markers."""
    rows = list(_readme_rows(report))
    columns = ("model", "N", "step", "ms", "images/s", "F", "× paper's order", "MB")
    lines = ["", machine(report["environment"]), "", *table(columns, rows, left=3), ""]
    lines += [
        "Products are counted in F, one plain forward pass of the student; MB is the peak above weights, gradients and",
        "optimiser state. The paper's order is written plainly and timed in the same rounds, at the same precision.",
        *("", *target_table(report["targets"]), ""),
    ]
    return "\n".join(lines)


def _readme_rows(report: Report) -> Iterator[tuple[str, ...]]:
    for c in report.get("step", {}).get("cells", []):
        if "ms" in c and (c["run"] == "eager" or c["precision"] == "bf16") and c["order"] != "one graph":
            times = c.get("times_as_fast", {}).get("paper")
            yield (
                *(c["arch"], str(c["batch"]), name(c).replace(", eager", "")),
                *(f"{c['ms']:.0f}", f"{c['images_s']:.3g}", number(c["forwards"])),
                c["check"].partition(":")[0] if c["check"] != "ok" else number(times),
                number(c["peak_bytes"], ".0f", 1e-6),
            )
