"""The proof of throughput in one command: the step in its variants, each checked first, its parts, and the targets.

    python -m benchmarks.report [--out DIR] [--minutes 9] [--device cpu] [--sections step,breakdown]
    python -m benchmarks.report --compare OLD.json
    python -m benchmarks.report --readme DIR
    python -m benchmarks.report --dry-run     # the plan for a GPU, in miniature and on this machine

It needs torch, triton and a checkout. What is not available, such as an extension that was not built, or does not fit
into the minutes, is named as such.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maskcf_fast.core.files import atomic_write

from . import breakdown, ops, rehearsal, scaling, step
from . import measure as m
from .compare import check_comparable, compare, failures
from .page import readme_section, targets, to_markdown
from .tables import write, write_json

# In the order in which they are measured, with their share of the minutes.
SECTIONS = {"step": 0.65, "breakdown": 0.05, "scaling": 0.1, "loader": 0.05, "ops": 0.15}
MARKERS = ("<!-- performance -->", "<!-- /performance -->")
ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")  # one of them has the markers

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        minutes: Time to spend; what does not fit is named as not measured.
        sections: Of `SECTIONS`.
        images: Folder of class folders or tar shards for the loader; None writes photographs.
        groups: Of the step; None for `benchmarks.step.plan`.
        series: Of `benchmarks.scaling.SERIES`; None for the device's.
        arch: Model of the breakdown and the loader-fed step; None for ViT-B/32 on a CPU, ViT-B/16 on a GPU.
        batch: Images of those; None for 16 on a CPU, 256 on a GPU.
        sizes: Models of the ops.
    """

    device: str = "auto"
    minutes: float = 9.0
    sections: tuple[str, ...] = tuple(SECTIONS)
    images: Path | None = None
    groups: tuple[step.Group, ...] | None = None
    series: tuple[str, int, dict[str, tuple[int, ...]]] | None = None
    arch: str | None = None
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
        keep: Called with the report after each section, and each group of steps, so that one cut short keeps what it
            has.

    Raises:
        ValueError: A device that is not there.
    """
    device = m.resolve_device(config.device)
    start = time.perf_counter()
    end = start + 60 * config.minutes
    report: dict[str, Any] = {"environment": m.environment(device), "minutes": config.minutes}

    def so_far(name: str, found: dict[str, Any]) -> None:
        report[name] = found
        report["seconds"] = time.perf_counter() - start
        report["targets"] = targets(report)
        keep(report)

    chosen = [name for name in SECTIONS if name in config.sections]
    for name in chosen:
        share = SECTIONS[name] / sum(SECTIONS[other] for other in chosen[chosen.index(name) :])
        seconds = max(share * (end - time.perf_counter()), 0.0)
        progress(f"{name}: {seconds:.0f} s")
        try:
            found = _section(name, config, device, seconds, progress, so_far)
        except Exception as error:  # one section must not cost the others their figures
            found = {"not_measured": f"{type(error).__name__}: {m.first_line(error)}"}
        so_far(name, found)
    return report


def _section(
    name: str,
    config: Config,
    device: torch.device,
    seconds: float,
    progress: Progress,
    so_far: Callable[[str, dict[str, Any]], None],
) -> dict[str, Any]:
    gpu = device.type == "cuda"
    arch, batch = config.arch or ("ViT-B/16" if gpu else "ViT-B/32"), config.batch or (256 if gpu else 16)
    if name == "step":
        return step.measure(device, seconds, config.groups, progress, lambda found: so_far("step", found))
    if name == "breakdown":
        return breakdown.measure(device, seconds, arch, batch, "bf16" if gpu else "fp32", progress=progress)
    if name == "scaling":
        return scaling.measure(device, seconds, config.series, progress)
    if name == "ops":
        sizes = config.sizes
        return ops.measure(ops.Config(str(device), sizes, minutes=max(seconds, 1) / 60, compiled=False), progress)
    try:
        from . import loader
    except ImportError as error:
        return {"fed": {"not_measured": f"not available: {error}"}, "not_measured": f"not available: {error}"}
    settings = loader.Config(
        config.images, batch=batch, threads=max(torch.get_num_threads(), 2), seconds=seconds / 12, device=str(device)
    )
    return loader.measure_with_step(settings, arch, seconds / 2)


def page_with_figures() -> Path:
    """The page that shows a report's figures."""
    return next((page for page in PAGES if page.is_file() and MARKERS[0] in page.read_text()), PAGES[0])


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
    parser.add_argument("--readme", type=Path, metavar="DIR", help="measure nothing; write DIR's report to the README")
    parser.add_argument("--dry-run", action="store_true", help="a GPU's plan on this machine, with tiny models")
    given = parser.parse_args(arguments)

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        if given.readme is not None:
            write_readme(json.loads((given.readme / "report.json").read_text()), page_with_figures())
            return 0
        old = None if given.compare is None else json.loads(given.compare.read_text())
        config = Config(given.device, given.minutes, tuple(given.sections.split(",")), given.images)
        if given.dry_run:
            arch, batch = rehearsal.ARCH, rehearsal.BATCH
            small: dict[str, Any] = {"arch": arch, "batch": batch, "sizes": (arch,), "series": rehearsal.SERIES}
            config = replace(config, groups=rehearsal.groups(), **small)
        if given.images is not None and not given.images.exists():
            raise ValueError(f"there are no --images {given.images}: check the path")
        device = m.resolve_device(given.device)
        if old is not None:
            check_comparable(old, m.device_name(device), torch.get_num_threads())
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    out = given.out or m.results_folder(device)
    out.mkdir(parents=True, exist_ok=True)  # before the measurement, not after: it may not be allowed
    partial = out / "partial.json"  # a report that is cut short replaces no complete one
    with rehearsal.rehearsal() if given.dry_run else nullcontext():
        try:
            report = measure(config, progress, lambda so_far: write_json(so_far, partial))
        except KeyboardInterrupt:
            progress(f"interrupted; what was measured: {partial}")
            return 130
    text = to_markdown(report)
    write(report, text, out, "report")
    partial.unlink(missing_ok=True)
    print(text)
    progress(f"Written: {out}")
    wrong = sorted(failures(report))
    for failure in wrong:
        progress(f"not right: {failure}")
    wrong = [failure for failure in wrong if given.dry_run or "FAILED" in failure]
    if old is None:
        return int(bool(wrong))
    try:
        lines, regressed = compare(report, old)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    return int(regressed or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
