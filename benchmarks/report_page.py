"""The report as a page, its targets, and the README's section, all from what ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import ops_report
from .ops_report import _table as table

Cell = dict[str, Any]
Report = dict[str, Any]

MAIN = "object-single"
NOTES = """\
A step is zeroing, backward, clipping and fused AdamW; variants of a model and a batch size take turns, round by round.
ms: median over the rounds and interquartile range. F: one plain forward pass of the batch, every token in every block;
products counted by `torch.utils.flop_counter`. Utilisation: those, by the time, of the rate of a large square product
in the same precision. × as fast: median over the rounds of the ratio within a round, against the paper's order written
plainly, at the same precision and in fp32. MB: highest point during a step above weights, gradients and moments.\
"""


def targets(report: Report) -> list[dict[str, str]]:
    """What the step is meant to reach, what was measured, and ``"met"``, ``"missed"`` or ``"not measured"``."""
    kind = report["environment"]["kind"]
    cells = [c for c in report.get("step", {}).get("cells", []) if "ms" in c and c["check"] == "ok"]
    steps = [c for c in cells if c["method"] == MAIN and c["order"] == "two passes"]
    plain = [c for c in steps if c["run"] == "eager"]

    def times(chosen: Sequence[Cell], other: str) -> list[tuple[str, float]]:
        return [(_where(c), c["times_as_fast"][other]) for c in chosen if other in c["times_as_fast"]]

    def precision(chosen: Sequence[Cell], name: str) -> list[Cell]:
        return [c for c in chosen if c["precision"] == name]

    over_random = [(where, 1 / ratio) for where, ratio in times(steps, "random")]
    found = [_target("CAM-masked step by random-mask step: at most 1.2", over_random, 1.2, most=True)]
    if kind == "cuda":
        used = [
            (_where(c), c["utilisation"]) for c in precision(steps, "bf16") if c["arch"] in ("ViT-B/16", "ViT-L/14")
        ]
        found += [
            *(
                _target(f"against the paper's order, both in {p}: 2.5 ×", times(precision(steps, p), "paper"), 2.5)
                for p in ("fp32", "bf16")
            ),
            _target("bf16 against the paper's order in fp32: 10 ×", times(precision(steps, "bf16"), "paper fp32"), 10),
            *(
                _target(f"utilisation in bf16, {arch}: at least 0.5", [u for u in _best(used) if arch in u[0]], 0.5)
                for arch in ("ViT-B/16", "ViT-L/14")
            ),
        ]
    else:
        amx = times(precision(plain, "bf16"), "paper fp32") if _has_amx() else []
        found += [
            _target("against the paper's order, fp32: 1.2 ×", times(precision(plain, "fp32"), "paper"), 1.2),
            _target("bf16 against the paper's order in fp32, with AMX: 2.5 ×", amx, 2.5),
            _target("on a GPU against the paper's order, equal precision: 2.5 ×", [], 2.5),
            _target("on a GPU in bf16 against the paper's order in fp32: 10 ×", [], 10),
            _target("on a GPU utilisation in bf16, B/16 and L/14: at least 0.5", [], 0.5),
        ]
    power = report.get("scaling", {}).get("tokens", {}).get("exponents", {}).get("step_bytes")
    slowdown = report.get("loader", {}).get("fed", {}).get("slowdown")
    return [
        *found,
        _target("memory at L/14 by the paper order's: at most 0.33", _memory(cells), 1 / 3, most=True),
        _target("memory in tokens: exponent at most 1.1", [] if power is None else [("", power)], 1.1, most=True),
        _target(
            "loader-fed step slower than synthetic data: at most 0.05",
            [] if slowdown is None else [("", slowdown)], 0.05, most=True,
        ),
    ]  # fmt: skip


def _target(text: str, values: Sequence[tuple[str, float]], bound: float, most: bool = False) -> dict[str, str]:
    """Held against the bound is every value; the worst decides."""
    if not values:
        return {"target": text, "measured": "", "state": "not measured"}
    worst = (max if most else min)(value for _, value in values)
    shown = "; ".join(f"{value:.2f}" + (f" ({where})" if where else "") for where, value in values)
    return {
        "target": text,
        "measured": shown,
        "state": "met" if (worst <= bound if most else worst >= bound) else "missed",
    }


def _best(values: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The highest value of each model: utilisation is what it reaches at the batch and run that suit it."""
    best: dict[str, tuple[str, float]] = {}
    for where, value in values:
        arch = where.split(",")[0]
        if arch not in best or value > best[arch][1]:
            best[arch] = (where, value)
    return list(best.values())


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


def to_markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The page; ``pictures`` are the charts beside it."""
    lines = ["# Throughput", "", machine(report), "", f"Measured in {report['seconds']:.0f} s by", "", "```bash"]
    lines += [
        report["environment"]["command"],
        "```",
        "",
        "## Targets",
        "",
        *_targets(report),
        "",
        "## Correctness",
        "",
    ]
    lines += _correctness(report["correctness"])
    parts = {"step": _step, "breakdown": _breakdown, "scaling": _scaling, "loader": _loader, "ops": _ops}
    for name, make in parts.items():
        lines += ["", f"## {name.capitalize()}", ""]
        section = report.get(name, {"not_measured": "not asked for"})
        if f"{name}.png" in pictures:
            lines += [f"![{name}]({name}.png)", ""]
        if "not_measured" in section and len(section) == 1:
            lines.append(f"Not measured: {section['not_measured']}.")
        else:
            lines += make(section)
    return "\n".join(lines) + "\n"


def machine(report: Report) -> str:
    """Where the report was measured, in a sentence."""
    env = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    threads = f", {env['threads']} threads" if env["kind"] == "cpu" else ""
    return f"{env['device']}{threads}; {versions}; load {env['load']:.1f} on {env['cores']} cores at the start."


def _targets(report: Report) -> list[str]:
    return table(("target", "measured", "state"), [tuple(t.values()) for t in report["targets"]], left=3)


def _correctness(rows: Sequence[dict[str, str]]) -> list[str]:
    count = {state: sum(row["status"].startswith(state) for row in rows) for state in ("ok", "FAILED", "not")}
    lines = [f"{count['ok']} checks passed, {count['FAILED']} FAILED, {count['not']} not checked or not available."]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault(row["status"], []).append(row["what"])
    return lines + ([""] if reasons else []) + [f"- {status}: {'; '.join(what)}" for status, what in reasons.items()]


def _step(section: dict[str, Any]) -> list[str]:
    rates = ", ".join(f"{rate / 1e12:.3g} in {name}" for name, rate in section["matrix_rate"].items())
    cells = section["cells"]
    columns = (
        "model",
        "N",
        "step",
        "images/s",
        "ms",
        "± IQR",
        "F",
        "utilisation",
        "× paper",
        "× paper fp32",
        "MB",
        "check",
    )
    rows = []
    for c in (c for c in cells if "ms" in c):
        times = c.get("times_as_fast", {})
        rows.append(
            (
                *(c["arch"], str(c["batch"]), name(c), f"{c['images_s']:.3g}", f"{c['ms']:.1f}", f"{c['iqr_ms']:.1f}"),
                f"{c['forwards']:.2f}" if c["forwards"] else "",
                f"{c['utilisation']:.0%}" if c["utilisation"] else "",
                *(f"{times[other]:.2f}" if other in times else "" for other in ("paper", "paper fp32")),
                f"{c['peak_bytes'] / 1e6:.0f}" if c["peak_bytes"] else "",
                c["check"],
            )
        )
    lines = [f"Rate of a large square product: {rates} (TFLOP/s).", "", NOTES, "", *table(columns, rows, left=3)]
    absent: dict[str, list[str]] = {}
    for c in (c for c in cells if "ms" not in c):
        absent.setdefault(f"{c['arch']}, N={c['batch']}", []).append(f"{name(c)} ({c['not_measured']})")
    if absent:
        lines += ["", "Not measured:", "", *(f"- {where}: {'; '.join(what)}" for where, what in absent.items())]
    return lines


def name(cell: Cell) -> str:
    """A cell's variant in words."""
    order = {"paper": "paper's order", "one graph": "one graph"}.get(cell["order"])
    return ", ".join(filter(None, (cell["method"], order, cell["run"], cell["precision"])))


def _breakdown(section: dict[str, Any]) -> list[str]:
    unit = section["forward"]
    rows = [
        (
            *(p["name"], f"{p['ms']:.1f}", f"{p['iqr_ms']:.1f}", f"{p['flops'] / unit:.3f}"),
            "" if p["theory"] is None else f"{p['theory'] / unit:.3f}",
        )
        for p in section["phases"]
    ]
    phases = section["phases"]
    total, expected = sum(p["flops"] for p in phases), sum(p["theory"] or 0 for p in phases)
    rows.append(("all", f"{sum(p['ms'] for p in phases):.1f}", "", f"{total / unit:.3f}", f"{expected / unit:.3f}"))
    where = f"{section['arch']}, {section['batch']} images, {section['method']}, {section['precision']}"
    whole = f"The step without waits between the phases takes {section['whole_ms']:.1f} ms."
    return [f"{where}. {whole}", "", *table(("phase", "ms", "± IQR", "F counted", "F by theory"), rows, left=1)]


def _scaling(section: dict[str, Any]) -> list[str]:
    arch, batch, precision = section["arch"], section["images"], section["precision"]
    lines = [
        f"{arch}, {batch} images, {section['method']}, {precision}, where not varied; tokens at half the depth.",
        "",
    ]
    rows, absent = [], []
    for series in ("batch", "tokens", "depth"):
        found = section.get(series, {"points": [], "exponents": {}})
        keys = ("step_ms", "paper_ms", "step_bytes", "paper_bytes")
        for p in found["points"]:
            if "not_measured" in p:
                absent.append(f"- {series} {p['x']}: not measured ({p['not_measured']})")
            else:
                scaled = (p[key] if key.endswith("ms") or not p[key] else p[key] / 1e6 for key in keys)
                rows.append((series, str(p["x"]), *("" if value is None else f"{value:.1f}" for value in scaled)))
        powers = (found["exponents"].get(key) for key in keys)
        rows.append((series, "exponent", *("" if power is None else f"{power:.2f}" for power in powers)))
    header = ("series", "value", "ms", "ms, paper's order", "MB", "MB, paper's order")
    lines += [*table(header, rows, left=2), ""]
    ranks = section["ranks"]
    if "not_measured" in ranks:
        absent.append(f"- processes: not measured ({ranks['not_measured']})")
    else:
        lines += [f"Two processes reach {ranks['efficiency']:.0%} of twice one process's images per second.", ""]
    return lines + absent


def _loader(section: dict[str, Any]) -> list[str]:
    lines = []
    if "not_measured" in section:
        lines.append(f"Not measured: {section['not_measured']}.")
    else:
        from .loader import to_markdown as loader_markdown

        lines += loader_markdown(section).rstrip().splitlines()
    fed = section["fed"]
    if "not_measured" in fed:
        return [*lines, "", f"Loader-fed step: {fed['not_measured']}."]
    text = f"{fed['fed_ms']:.1f} ms against {fed['synthetic_ms']:.1f} ms"
    return [
        *lines,
        "",
        f"A step fed by the loader against one on a batch that is there: {text}, {fed['slowdown']:+.1%}.",
    ]


def _ops(section: dict[str, Any]) -> list[str]:
    text = ops_report.to_markdown(section).replace("\n## ", "\n### ")
    return text[text.index("###") :].rstrip().splitlines()


def readme_section(report: Report) -> str:
    """The README's performance section, between its markers."""
    rows = list(_readme_rows(report))
    columns = ("model", "N", "step", "ms", "images/s", "F", "× paper's order", "MB")
    lines = ["", machine(report), "", *table(columns, rows, left=3), ""]
    lines += [
        "Products are counted in F, one plain forward pass of the student; MB is the peak above weights, gradients and",
        "optimiser state. The paper's order is written plainly and timed in the same rounds, at the same precision.",
        *("", *_targets(report), ""),
    ]
    return "\n".join(lines)


def _readme_rows(report: Report) -> Iterator[tuple[str, ...]]:
    for c in report.get("step", {}).get("cells", []):
        if "ms" in c and c["run"] == "eager" and c["order"] != "one graph":
            times = c.get("times_as_fast", {}).get("paper")
            yield (
                *(c["arch"], str(c["batch"]), name(c).replace(", eager", "")),
                *(f"{c['ms']:.0f}", f"{c['images_s']:.3g}", f"{c['forwards']:.2f}" if c["forwards"] else ""),
                c["check"].partition(":")[0] if c["check"] != "ok" else "" if times is None else f"{times:.2f}",
                f"{c['peak_bytes'] / 1e6:.0f}" if c["peak_bytes"] else "",
            )
