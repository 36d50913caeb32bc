"""What every benchmark tells its results with: options, tables, pages and targets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maskcf_fast.core.files import atomic_write

from .measure import device_name, progress

SHARED: dict[str, dict[str, Any]] = {
    "device": {"default": "auto", "help": "auto, cpu or cuda"},
    "out": {"type": Path, "help": "folder of the results (benchmarks/results/DEVICE)"},
    "minutes": {"type": float, "help": "time to spend"},
    "dry_run": {"action": "store_true", "help": "a GPU's plan on this machine, with tiny models"},
}


def options(name: str, doc: str | None, arguments: Sequence[str], *shared: str, **own: dict[str, Any]) -> Any:
    """Parse a benchmark's arguments: some of `SHARED`, and its own, as `argparse` takes them."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, settings in ({name: SHARED[name] for name in shared} | own).items():
        parser.add_argument(f"--{option.replace('_', '-')}", **settings)
    return parser.parse_args(arguments)


def results_folder(out: Path | None, device: torch.device) -> Path:
    """``out``, or where a device's results are committed; made before a measurement, since it may not be allowed."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in device_name(device).lower()).split())
    out = out or Path(__file__).parent / "results" / slug
    out.mkdir(parents=True, exist_ok=True)
    return out


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table padded to read as text; the first ``left`` columns to the left, numbers to the right."""
    # FAILED and its reason are wider than any number: they do not widen the column.
    widths = [max(len(c) for c in column if not c.startswith("FAILED")) for column in zip(header, *rows, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in (header, rule, *rows)
    ]
    return [f"| {' | '.join(row)} |" for row in padded]


def number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """A value as text; nothing for what was not measured, or is 0."""
    return f"{value * scale:{form}}" if value else ""


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"


def target(text: str, values: Sequence[tuple[str, float]], bound: float, *, most: bool = False) -> dict[str, str]:
    """A target that every value must reach or, with ``most``, stay within: the worst decides."""
    if not values:
        return {"target": text, "measured": "", "state": "not measured"}
    worst = (max if most else min)(value for _, value in values)
    shown = "; ".join(f"{value:.2f}" + (f" ({where})" if where else "") for where, value in values)
    met = worst <= bound if most else worst >= bound
    return {"target": text, "measured": shown, "state": "met" if met else "missed"}


def target_table(targets: Sequence[dict[str, str]]) -> list[str]:
    """Targets, what was measured, and whether that meets them."""
    return table(("target", "measured", "state"), [tuple(t.values()) for t in targets], left=3)


def machine(environment: dict[str, Any]) -> str:
    """Where results were measured, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    threads = f", {environment['threads']} threads" if environment["kind"] == "cpu" else ""
    load = (
        f"; load {environment['load']:.1f} on {environment['cores']} cores at the start"
        if "load" in environment
        else ""
    )
    return f"{environment['device']}{threads}; {versions}{load}."


def heading(title: str, results: dict[str, Any]) -> list[str]:
    """The top of a page: where, how long, and by which command."""
    env = results["environment"]
    measured = f"Measured in {results['seconds']:.0f} s by"
    return [f"# {title}", "", machine(env), "", measured, "", "```bash", env["command"], "```", ""]


def write(results: dict[str, Any], text: str, out: Path, name: str) -> None:
    """``NAME.json`` and ``NAME.md`` in a folder; the page is printed as well."""
    atomic_write(out / f"{name}.md", text.encode())
    write_json(results, out / f"{name}.json")
    print(text)
    progress(f"Written: {out / name}.json, {out / name}.md")


def write_json(results: dict[str, Any], path: Path) -> None:
    """Results as they are so far."""
    atomic_write(path, (json.dumps(results, indent=1) + "\n").encode())
