"""The report as a page, and its targets, from what ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import memory, ops
from .roofline import kinds_table
from .tables import digits, heading, number, table, target, target_table
from .workload import Variant

Cell = dict[str, Any]
Report = dict[str, Any]

NOTES = """\
A step is zeroing, backward, clipping and fused AdamW; variants of a model and a batch size take turns, round by round.
ms: median over the rounds and interquartile range. F: one plain forward pass of the batch, every token in every block;
products counted by `torch.utils.flop_counter`. Utilisation: those, by the time, of the rate of a large square product
in the same precision. × paper: median over the rounds of the ratio within a round, against the paper's order written
plainly, at the same precision, compiled, in TF32 and in fp32; blocks: against plain PyTorch whose blocks are compiled
as a whole. MB: highest point during a step above weights, gradients and moments.\
"""


def variant(cell: Cell) -> str:
    """A cell's variant in words."""
    return str(Variant(*(cell[name] for name in Variant._fields)))


def _times(other: str) -> Callable[[Cell], str]:
    return lambda c: number(c.get("times_as_fast", {}).get(other))


COLUMNS: dict[str, Callable[[Cell], str]] = {
    "model": lambda c: c["arch"],
    "N": lambda c: str(c["batch"]),
    "step": variant,
    "ms": lambda c: digits(c["ms"]),
    "± IQR": lambda c: digits(c["iqr_ms"]),
    "images/s": lambda c: f"{c['images_s']:.3g}",
    "F": lambda c: number(c["forwards"]),
    "utilisation": lambda c: number(c["utilisation"], ".0%"),
    "× paper": _times("paper"),
    "compiled": _times("paper compiled"),
    "TF32": _times("paper tf32"),
    "fp32": _times("paper fp32"),
    "blocks": _times("compiled blocks"),
    "MB": lambda c: number(c["peak_bytes"], ".0f", 1e-6),
}


def step_table(cells: Iterable[Cell], columns: Iterable[str] = COLUMNS) -> list[str]:
    """A line for every cell that was measured."""
    columns = tuple(columns)
    return table(columns, [[COLUMNS[name](c) for name in columns] for c in cells if "ms" in c], left=3)


def targets(report: Report) -> list[dict[str, str]]:
    """What the step is meant to reach, what was measured, and ``"met"``, ``"missed"`` or ``"not measured"``."""
    every = [c for c in report.get("step", {}).get("cells", []) if "ms" in c and c["order"] == "two passes"]
    steps = [c for c in every if c["method"] == "object-single"]

    def times(other: str, precision: str, run: str | None = None) -> list[tuple[str, float]]:
        chosen = [c for c in steps if c["precision"] == precision and run in (None, c["run"])]
        return [(_where(c), c["times_as_fast"][other]) for c in chosen if other in c["times_as_fast"]]

    over_random = [(_where(c), 1 / c["times_as_fast"]["random"]) for c in steps if "random" in c["times_as_fast"]]
    found = [target("CAM-masked step by random-mask step: at most 1.2", over_random, 1.2, most=True)]
    if report["environment"]["kind"] == "cuda":
        for precision in ("fp32", "bf16"):
            equal = times("paper", precision)
            found.append(target(f"against the paper's order, both in {precision}: 2.5 ×", equal, 2.5))
        found.append(target("bf16 against the paper's order in fp32: 10 ×", times("paper fp32", "bf16"), 10))
        for arch in ("ViT-B/16", "ViT-L/14"):  # what a model reaches at the batch and run that suit it
            used = [(_where(c), c["utilisation"]) for c in steps if (c["arch"], c["precision"]) == (arch, "bf16")]
            best = [max(used, key=lambda pair: pair[1])] if used else []
            found.append(target(f"utilisation in bf16, {arch}: at least 0.5", best, 0.5))
    else:
        found += [
            target("against the paper's order, both in fp32: 1.25 ×", times("paper", "fp32", "eager"), 1.25),
            target("against the paper's order, both in bf16: 1.6 ×", times("paper", "bf16", "eager"), 1.6),
            target("bf16 against the paper's order in fp32: 3 ×", times("paper fp32", "bf16", "eager"), 3),
            target("on a GPU against the paper's order, equal precision: 2.5 ×", [], 2.5),
            target("on a GPU in bf16 against the paper's order in fp32: 10 ×", [], 10),
            target("on a GPU utilisation in bf16, B/16 and L/14: at least 0.5", [], 0.5),
        ]
    random = {(c["arch"], c["batch"], c["precision"]): c for c in every if c["method"] == "random-single"}
    keys = [(c, random.get((c["arch"], c["batch"], c["precision"]))) for c in steps if c["run"] == "eager"]
    cam = [(_where(c), c["forwards"] - r["forwards"]) for c, r in keys if r and c["forwards"] and r["forwards"]]
    found.append(target("products of the map, its backward pass included: at most 1.3 F", cam, 1.3, most=True))
    section = report.get("memory", {})
    of_paper = memory.shares(section) if "steps" in section else {}
    peak = [(name, share) for name, share in of_paper.items() if name == f"object-single, {section['precision']}"]
    power = report.get("scaling", {}).get("tokens", {}).get("exponents", {}).get("step_bytes")
    slowdown = report.get("loader", {}).get("fed", {}).get("slowdown")
    for text, values, bound in (
        ("memory at L/14 by the paper order's: at most 0.33", peak, 1 / 3),
        ("memory in tokens: exponent at most 1.1", [] if power is None else [("", power)], 1.1),
        (
            "loader-fed step slower than synthetic data: at most 0.05",
            [] if slowdown is None else [("", slowdown)],
            0.05,
        ),
    ):
        found.append(target(text, values, bound, most=True))
    return found


def _where(cell: Cell) -> str:
    run = "" if cell["run"] == "eager" else f", {cell['run']}"
    return f"{cell['arch']}, N={cell['batch']}, {cell['precision']}{run}"


def to_markdown(report: Report) -> str:
    """The page."""
    lines = heading("Throughput", report)
    if "checked" in report:
        lines += [f"Tests of the variants: {report['checked']}.", ""]
    lines += ["## Targets", "", *target_table(report["targets"])]
    for name, make in {
        "step": _step,
        "breakdown": _breakdown,
        "operations": _operations,
        "memory": memory_lines,
        "scaling": _scaling,
        "loader": _loader,
        "ops": _ops,
    }.items():
        section = report.get(name, {"not_measured": "not asked for"})
        reason = section.get("not_measured")
        lines += [
            "",
            f"## {name.capitalize()}",
            "",
            *(make(section) if reason is None else [f"Not measured: {reason}."]),
        ]
    return "\n".join(lines) + "\n"


def _step(section: dict[str, Any]) -> list[str]:
    rates = ", ".join(f"{rate / 1e12:.3g} in {name}" for name, rate in section["matrix_rate"].items())
    lines = [f"Rate of a large square product: {rates} (TFLOP/s).", "", *NOTES.splitlines(), ""]
    lines += step_table(section["cells"])
    absent: dict[tuple[str, int, str], list[str]] = {}
    for c in section["cells"]:
        if "ms" not in c:
            absent.setdefault((c["arch"], c["batch"], c["not_measured"]), []).append(variant(c))
    if absent:
        lines += ["", "Not measured:", ""]
    return lines + [f"- {arch}, N={n}: {'; '.join(what)} ({why})" for (arch, n, why), what in absent.items()]


def _breakdown(section: dict[str, Any]) -> list[str]:
    unit, phases = section["forward"], section["phases"]
    rows = [[p["name"], f"{p['ms']:.1f}", f"{p['iqr_ms']:.1f}", f"{p['flops'] / unit:.3f}"] for p in phases]
    total = [sum(p[key] for p in phases) for key in ("ms", "flops")]
    rows.append(["all", f"{total[0]:.1f}", "", f"{total[1] / unit:.3f}"])
    where = f"{section['arch']}, {section['batch']} images, {section['method']}, {section['precision']}"
    whole = f"The step without waits between the phases takes {section['whole_ms']:.1f} ms."
    return [f"{where}. {whole}", "", *table(("phase", "ms", "± IQR", "F"), rows, left=1)]


def _operations(section: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for step in section["steps"]:
        lines += [f"{operations_of(step)}:", "", *kinds_table(step["kinds"]), ""]
    return lines[:-1]


def operations_of(step: dict[str, Any]) -> str:
    """What the operations are of that `benchmarks.roofline.measure` took the time of, and at which rates."""
    rates = f"{step['bandwidth'] / 1e9:.1f} GB/s and {step['matrix'] / 1e9:.0f} GFLOP/s"
    where = f"{step['arch']}, {step['batch']} images, {step['method']}, {step['precision']}"
    return f"{where}, at {rates} here; the step by itself takes {step['whole_ms']:.0f} ms"


def memory_lines(section: dict[str, Any]) -> list[str]:
    """Peak memory by way to compute the step."""
    of_paper = memory.shares(section)
    rows = [
        (step["name"], number(step["peak_bytes"], ".0f", 1e-6), number(of_paper.get(step["name"])))
        for step in section["steps"]
    ]
    header = ("step", "MB", "of the paper order's")
    return [f"{section['arch']}, {section['batch']} images.", "", *table(header, rows, left=1)]


def _scaling(section: dict[str, Any]) -> list[str]:
    where = f"{section['arch']}, {section['images']} images, {section['method']}, {section['precision']}"
    rows: list[Sequence[str]] = []
    absent: list[str] = []
    keys = {"step_ms": 1.0, "paper_ms": 1.0, "step_bytes": 1e-6, "paper_bytes": 1e-6}
    for series in ("batch", "tokens", "depth"):
        for p in section[series]["points"]:
            if "not_measured" in p:
                absent.append(f"- {series} {p['x']}: not measured ({p['not_measured']})")
            else:
                rows.append((series, str(p["x"]), *(number(p[key], ".1f", scale) for key, scale in keys.items())))
        rows.append((series, "exponent", *(number(section[series]["exponents"].get(key)) for key in keys)))
    header = ("series", "value", "ms", "ms, paper's order", "MB", "MB, paper's order")
    return [f"{where}, where not varied; tokens at half the depth.", "", *table(header, rows, left=2), "", *absent]


def _loader(section: dict[str, Any]) -> list[str]:
    from .loader import to_markdown as loader_markdown  # needs what the loaders need

    fed = section["fed"]
    if "not_measured" in fed:
        text = f"Loader-fed step: {fed['not_measured']}."
    else:
        times = f"{fed['fed_ms']:.1f} ms against {fed['synthetic_ms']:.1f} ms, {fed['slowdown']:+.1%}"
        text = f"A step fed by the loader against one on a batch that is there: {times}."
    return [*loader_markdown(section).rstrip().splitlines(), "", text]


def _ops(section: dict[str, Any]) -> list[str]:
    return ops.sections(section, level="###")
