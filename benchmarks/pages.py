"""The figures on the README's and the performance page, from the committed ``report.json`` and ``ops.json``.

    python -m benchmarks.pages

Each stands between ``<!-- figures: NAME -->`` and ``<!-- /figures -->``; tests hold the pages to the results.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskcf_fast.core.command import command
from maskcf_fast.core.errors import UserError
from maskcf_fast.core.files import atomic_write
from maskcf_fast.core.schema import read_record

from .page import memory_lines, operations_of, step_table, targets
from .roofline import kinds_table
from .tables import digits, machine, number, options, table, target_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
RESULTS = ROOT / "benchmarks" / "results"
MACHINES = ("amd-epyc-avx2", "amd-epyc-avx512")  # the first is the README's
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- /figures -->)", re.DOTALL)
STEP = ("model", "N", "step", "ms", "images/s", "F", "× paper", "MB")


class Results(dict[str, Any]):
    """What a results file holds, by section; one that it lacks is told with the command that measures it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found: dict[str, Any] = read_record(path, dict[str, Any])
        lacking = [name for name, held in found.items() if isinstance(held, dict) and "not_measured" in held]
        super().__init__((name, held) for name, held in found.items() if name not in lacking)

    def __missing__(self, name: str) -> Any:
        raise UserError(
            f"{self.path} lacks the section {name!r}: measure all again on that machine, "
            f"`python -m benchmarks.{self.path.stem} --out {self.path.parent}`"
        )


def step(reports: list[Results], ops: Results) -> list[str]:
    """Every step that was measured, and the targets, by machine."""
    lines = []
    for report in reports:
        cells = [c for c in report["step"]["cells"] if c["order"] != "one graph"]
        lines += [machine(report["environment"]), "", *step_table(cells, STEP), ""]
        lines += [*target_table(targets(report)), ""]
    return lines[:-1]


def memory(reports: list[Results], ops: Results) -> list[str]:
    """Peak memory of a large model."""
    return memory_lines(reports[0]["memory"])


def operations(reports: list[Results], ops: Results) -> list[str]:
    """What each kind of work must at least take and took, and what of the step the products leave to gain."""
    lines = []
    for report in reports:
        lines += [machine(report["operations"].get("environment", report["environment"])), ""]
        for found in report["operations"]["steps"]:
            lines += [f"{operations_of(found)}:", "", *kinds_table(found["kinds"]), "", *limit(report, found), ""]
    return lines[:-1]


def limit(report: Results, found: Results) -> list[str]:
    """How fast a step could be against the paper's order, if it consisted of its products."""
    times = {kind["name"]: kind["ms"] for kind in found["kinds"]}
    least = {kind["name"]: kind["least_ms"] for kind in found["kinds"]}
    total, products = sum(times.values()), times["products"]
    rest = total - products
    forwards = {c["order"]: c["forwards"] for c in report["step"]["cells"]
                if (c["arch"], c["batch"], c["method"]) == (found["arch"], found["batch"], found["method"])
                and c.get("forwards")}  # fmt: skip
    more = forwards["paper"] / forwards["two passes"]
    best = (products * more + rest) / products
    return [
        f"Products are {products / total:.0%} of it, at {least['products'] / products:.0%} of the machine's rate. The "
        f"paper's order has {more:.2f} times as many:",
        f"if the step were its products alone, and all else took the paper's order what it takes the step now, that "
        f"would be {best:.2f} ×.",
    ]


def op_table(ops: Results) -> list[str]:
    """Every op that was measured: what ``auto`` takes against plain PyTorch."""
    cells = []
    for row in ops["rows"]:
        if "variants" not in row:
            continue
        taken, plain = row["variants"][row["auto"]], row["variants"]["eager"]
        if "ms" not in taken:
            continue
        times = (number(taken["times_as_fast"].get(other)) for other in ("paper", "eager", "compiled"))
        peaks = (number(found.get("peak_bytes"), ".1f", 1e-6) for found in (taken, plain))
        op, case = f"`{row['op']}`, {row['case']}", f"{row['size']}, {row['batch']}"
        cells.append((op, case, digits(taken["ms"]), *times, *peaks))
    header = ("op", "model, images", "ms", "× paper", "× plain", "× compiled", "MB", "of plain")
    return [machine(ops["environment"]), "", *table(header, cells, left=2)]


def readme_step(reports: list[Results], ops: Results) -> list[str]:
    """The step against the paper's order: arithmetic, speed, memory."""
    report = reports[0]
    what = ("ViT-B/32", 16, "object-single", "eager")
    cells = {
        (c["order"], c["precision"]): c
        for c in report["step"]["cells"]
        if (c["arch"], c["batch"], c["method"], c["run"]) == what and "ms" in c
    }
    ours, paper = cells["two passes", "fp32"], cells["paper", "fp32"]
    large = report["memory"]
    peaks = {found["name"]: found["peak_bytes"] for found in large["steps"]}
    plain, kept = next(iter(peaks.values())), peaks[f"object-single, {large['precision']}"]
    megabytes = "{:.0f} instead of {:.0f} MB".format
    return [
        "| | F | × as fast | peak memory |",
        "|---|--:|--:|--:|",
        f"| ViT-B/32, {ours['batch']} images | {ours['forwards']:.2f} instead of {paper['forwards']:.2f} "
        f"| {ours['times_as_fast']['paper']:.2f} | {megabytes(ours['peak_bytes'] / 1e6, paper['peak_bytes'] / 1e6)} |",
        f"| {large['arch']}, {large['batch']} images | | | {megabytes(kept / 1e6, plain / 1e6)} |",
        "| on a GPU | | not measured | not measured |",
    ]


def readme_ops(reports: list[Results], ops: Results) -> list[str]:
    """The fused ops against plain PyTorch, and where all of this was measured."""
    lines = ["| | ms | × plain PyTorch | × the paper's formula | memory |", "|---|--:|--:|--:|--:|"]
    shown = {
        ("attention_relevance", "one layer"): "",
        ("counterfactual_refill", "threshold, float32"): "",
        ("counterfactual_refill", "threshold, uint8"): ", uint8",
        ("gather_tokens", "single-fill, forward and backward"): " and its gradient",
        ("bias_gelu", "forward and backward"): " and its gradients",
        ("residual_norm", "forward and backward"): " and its gradients",
    }
    rows = {(row["op"], row["case"]): row for row in ops["rows"] if row["size"] == "ViT-B/16"}
    for (op, case), words in shown.items():
        variants = rows[op, case]["variants"]
        taken, plain = variants[rows[op, case]["auto"]], variants["eager"]
        times = (number(taken["times_as_fast"].get(other), ".1f") for other in ("eager", "paper"))
        peaks = f"{number(taken['peak_bytes'], '.3g', 1e-6)} instead of {plain['peak_bytes'] / 1e6:.0f} MB"
        lines.append(f"| `{op}`{words} | {digits(taken['ms'])} | {' | '.join(times)} | {peaks} |")
    lines += ["| on a GPU | not measured | | | |", ""]
    measured = [(what, results["environment"]) for what, results in (("step", reports[0]), ("ops", ops))]
    commands = ", ".join(f"`{where['command']}` ({what}, threads: {where['threads']})" for what, where in measured)
    versions = ", ".join(f"{name} {version}" for name, version in measured[0][1]["versions"].items())
    return [*lines, f"{measured[0][1]['device']}; {versions}; {commands}."]


BLOCKS: dict[str, Callable[[list[Results], Results], list[str]]] = {
    "step": step,
    "memory": memory,
    "operations": operations,
    "ops": lambda reports, ops: op_table(ops),
    "readme-step": readme_step,
    "readme-ops": readme_ops,
}


def filled(text: str, reports: list[Results], ops: Results) -> str:
    """A page with its figures made anew.

    Raises:
        UserError: A block has a name that is none of `BLOCKS`, or the results lack what it shows.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise UserError(f"a page has figures {found[2]!r}, which are none of {', '.join(BLOCKS)}")
        try:
            lines = BLOCKS[found[2]](reports, ops)
        except KeyError as error:
            raise UserError(f"figures {found[2]!r}: the results lack {error}; measure with more --minutes") from error
        return "\n".join([found[1].rstrip(), "", *lines, "", found[3]])

    return BLOCK.sub(block, text)


def committed() -> tuple[list[Results], Results]:
    """The reports of `MACHINES`, and the ops' results of the first."""
    reports = [Results(RESULTS / name / "report.json") for name in MACHINES]
    return reports, Results(RESULTS / MACHINES[0] / "ops.json")


@command()
def main(arguments: list[str]) -> None:
    options("pages", __doc__, arguments)
    results = committed()
    for page in PAGES:
        atomic_write(page, filled(page.read_text(), *results).encode())


if __name__ == "__main__":
    sys.exit(main())
