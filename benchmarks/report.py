"""The proof of throughput in one command: correctness first, then the step, its parts, and the targets.

    python -m benchmarks.report [--out DIR] [--minutes 9] [--device cpu] [--sections step breakdown]
    python -m benchmarks.report --compare OLD.json
    python -m benchmarks.report --readme DIR

It needs torch, triton, numpy, matplotlib and a checkout; with nvcc it builds the extension first. What is not
available, or does not fit into the minutes, is named as such.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskcf_fast.core.files import atomic_write
from maskcf_fast.ops import extension

from . import breakdown, correctness, fed_step, ops, scaling, step
from . import measure as m
from .charts import CHARTS, charts
from .compare import check_comparable, compare, failures
from .report_page import readme_section, targets, to_markdown

# In the order in which they are measured, with their share of the minutes; correctness always comes first.
SECTIONS = {"step": 0.55, "breakdown": 0.05, "scaling": 0.15, "loader": 0.1, "ops": 0.15}
CHECKING = 0.15  # share of the minutes after which no more is compiled only to be checked
MARKERS = ("<!-- performance -->", "<!-- /performance -->")
ROOT = Path(__file__).resolve().parents[1]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        minutes: Time to spend; what does not fit is named as not measured.
        sections: Of `SECTIONS`.
        images: Folder of class folders or tar shards for the loader; None writes photographs.
        runs: Of the step, to check: ``"eager"``, ``"compiled"``, ``"graphed"``.
        groups: Of the step; None for `benchmarks.step.plan`.
        series: Of `benchmarks.scaling.SERIES`; None for the device's.
        arch: Model of the breakdown and the loader-fed step.
        batch: Images of those; None for 16 on a CPU, 256 on a GPU.
        sizes: Models of the ops.
    """

    device: str = "auto"
    minutes: float = 9.0
    sections: tuple[str, ...] = tuple(SECTIONS)
    images: Path | None = None
    runs: tuple[str, ...] = ("eager", "compiled", "graphed")
    groups: tuple[step.Group, ...] | None = None
    series: tuple[str, int, dict[str, tuple[int, ...]]] | None = None
    arch: str = "ViT-B/32"
    batch: int | None = None
    sizes: tuple[str, ...] = ("ViT-B/32", "ViT-L/14")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sections if name not in SECTIONS]:
            raise ValueError(f"sections has {unknown[0]!r}, which is none of {', '.join(SECTIONS)}")
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")


def measure(
    config: Config,
    progress: Progress = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure; returns what ``report.json`` holds.

    Args:
        config: What to measure.
        progress: Called with a line now and then.
        keep: Called with the report after each section, so that one cut short keeps what it has.

    Raises:
        ValueError: A device that is not there.
    """
    device = m.resolve_device(config.device)
    start = time.perf_counter()
    end = start + 60 * config.minutes
    report: dict[str, Any] = {"environment": m.environment(device), "minutes": config.minutes}
    report["correctness"] = checks = correctness.measure(
        device, runs=config.runs, seconds=60 * CHECKING * config.minutes, progress=progress
    )
    chosen = [name for name in SECTIONS if name in config.sections]
    for name in chosen:
        share = SECTIONS[name] / sum(SECTIONS[other] for other in chosen[chosen.index(name) :])
        seconds = max(share * (end - time.perf_counter()), 0.0)
        progress(f"{name}: {seconds:.0f} s")
        try:
            report[name] = _section(name, config, device, seconds, checks, progress)
        except Exception as error:  # one section must not cost the others their figures
            report[name] = {"not_measured": f"{type(error).__name__}: {ops.first_line(error)}"}
        report["seconds"] = time.perf_counter() - start
        report["targets"] = targets(report)
        keep(report)
    return report


def _section(
    name: str, config: Config, device: torch.device, seconds: float, checks: list[dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    batch = config.batch or (256 if device.type == "cuda" else 16)
    if name == "step":
        failed = lambda variant: correctness.failure(checks, variant)  # noqa: E731
        return step.measure(device, seconds, config.groups, failed, progress)
    if name == "breakdown":
        precision = "bf16" if device.type == "cuda" else "fp32"
        return breakdown.measure(device, seconds, config.arch, batch, precision, progress=progress)
    if name == "scaling":
        return scaling.measure(device, seconds, config.series, progress)
    if name == "ops":
        sizes = config.sizes
        return ops.measure(ops.Config(str(device), sizes, minutes=max(seconds, 1) / 60, compiled=False), progress)
    threads = max(torch.get_num_threads(), 2)
    fed = fed_step.measure(device, seconds / 2, config.images, config.arch, batch, threads)
    try:
        from . import loader
    except ImportError as error:
        return {"fed": fed, "not_measured": f"not available: {error}"}
    each = seconds / 2 / 6  # ways to load
    settings = loader.Config(config.images, batch=batch, threads=threads, seconds=each, device=str(device))
    try:
        return loader.measure(settings) | {"fed": fed}
    except (RuntimeError, OSError) as error:
        return {"fed": fed, "not_measured": ops.first_line(error)}


def build_extension(progress: Progress) -> None:
    """Compile the extension where nvcc is and none was built; a failure leaves it out, as the report then says."""
    if shutil.which("nvcc") is None or extension.library_path().is_file():
        return
    progress("building the extension")
    done = subprocess.run([sys.executable, "-m", "maskcf_fast.build"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        progress(f"the extension could not be built: {ops.first_line(done.stderr)}")


def write_readme(report: dict[str, Any], readme: Path) -> None:
    """Put the report's figures between the markers of the README.

    Raises:
        ValueError: The README has no markers.
    """
    text = readme.read_text()
    if any(marker not in text for marker in MARKERS):
        raise ValueError(f"{readme} has no {MARKERS[0]} … {MARKERS[1]}: add both where the section belongs")
    before, after = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[2]
    atomic_write(readme, f"{before}{MARKERS[0]}\n{readme_section(report)}{MARKERS[1]}{after}".encode())


def write(report: dict[str, Any], out: Path) -> None:
    """``report.json``, ``report.md`` and the charts."""
    pictures = charts(report)
    for name in CHARTS:
        (out / name).unlink(missing_ok=True)
    for name, data in pictures.items():
        atomic_write(out / name, data)
    atomic_write(out / "report.md", to_markdown(report, list(pictures)).encode())
    write_json(report, out / "report.json")


def write_json(report: dict[str, Any], path: Path) -> None:
    """A report as it is so far."""
    atomic_write(path, (json.dumps(report, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/DEVICE)")
    parser.add_argument("--minutes", type=float, default=Config.minutes, help="time to spend (9)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--images", type=Path, help="class folders or tar shards for the loader")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="fail if slower than this report")
    parser.add_argument("--readme", type=Path, metavar="DIR", help="measure nothing; put DIR's report into docs/")
    given = parser.parse_args(arguments)

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        if given.readme is not None:
            write_readme(json.loads((given.readme / "report.json").read_text()), ROOT / "docs" / "performance.md")
            return 0
        old = None if given.compare is None else json.loads(given.compare.read_text())
        config = Config(given.device, given.minutes, tuple(given.sections.split(",")), given.images)
        if given.images is not None and not given.images.exists():
            raise ValueError(f"there are no --images {given.images}: check the path")
        device = m.resolve_device(given.device)
        if old is not None:
            check_comparable(old, m.device_name(device), torch.get_num_threads())
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    out = given.out or ROOT / "benchmarks" / "results" / m.slug(m.device_name(device))
    out.mkdir(parents=True, exist_ok=True)  # before the measurement, not after: it may not be allowed
    build_extension(progress)
    partial = out / "partial.json"  # a report that is cut short replaces no complete one
    try:
        report = measure(config, progress, lambda so_far: write_json(so_far, partial))
    except KeyboardInterrupt:
        progress(f"interrupted; the sections that were measured: {partial}")
        return 130
    write(report, out)
    partial.unlink(missing_ok=True)
    print((out / "report.md").read_text())
    progress(f"Written: {out}")
    for failure in sorted(failures(report)):
        progress(f"not right: {failure}")
    wrong = any(check["status"].startswith("FAILED") for check in report["correctness"])
    if old is None:
        return int(wrong)
    try:
        lines, regressed = compare(report, old)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    return int(regressed or wrong)


if __name__ == "__main__":
    sys.exit(main())
