"""The proof of throughput in one command: the tests of what is timed, the step in its variants, its parts, the targets.

    python -m benchmarks.report [--out DIR] [--minutes 9] [--device cpu] [--sections step,breakdown]
    python -m benchmarks.report --compare OLD.json
    python -m benchmarks.report --dry-run     # the plan for a GPU, in miniature and on this machine

It needs torch, triton and a checkout. What is not available, such as an extension that was not built, or does not fit
into the minutes, is named as such. Nothing is timed whose tests fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from maskcf_fast.core.command import command
from maskcf_fast.core.errors import UserError
from maskcf_fast.core.precision import slow_products

from . import breakdown, memory, ops, rehearsal, roofline, step
from . import measure as m
from .compare import check_comparable, compare, failures
from .page import targets, to_markdown
from .tables import options, results_folder, write, write_json

# In the order in which they are measured, with their share of the minutes; the last two take what they need.
SECTIONS = {
    "step": 0.5, "breakdown": 0.05, "scaling": 0.1, "loader": 0.05, "ops": 0.1, "operations": 0.1, "memory": 0.1,
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/methods/test_variants.py"  # that every variant computes the paper's function


def check(device: torch.device) -> str:
    """Run the tests of the step's variants on the device; what pytest says of them.

    Raises:
        UserError: One fails.
    """
    if find_spec("pytest") is None:
        return "not checked: pytest is not installed"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", TESTS, "-k", device.type]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a step is not the paper's function, and is not timed:\n{done.stdout}{done.stderr}")
    return f"{done.stdout.splitlines()[-1]}: `pytest {TESTS} -k {device.type}`"


def measure(
    device: torch.device,
    minutes: float = 9.0,
    sections: Sequence[str] = tuple(SECTIONS),
    images: Path | None = None,
    tiny: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure; returns what ``report.json`` holds.

    Args:
        device: Where.
        minutes: Time to spend; what does not fit is named as not measured.
        sections: Of `SECTIONS`.
        images: Folder of class folders or tar shards for the loader; None writes photographs.
        tiny: A rehearsal: a GPU's groups with tiny models.
        keep: Called with the report after each section, and each group of steps, so that one cut short keeps what it
            has.
    """
    gpu = device.type == "cuda"
    arch, batch = ("ViT-B/16", 256) if gpu else ("ViT-B/32", 16)  # of the phases, operations and the loader-fed step
    large: tuple[str, int] = ("ViT-L/14", 32 if gpu else 2)  # of the memory
    sizes: Sequence[str] = ("ViT-B/32", "ViT-L/14")  # of the ops
    if tiny:
        arch, batch, sizes = rehearsal.ARCH, rehearsal.BATCH, (rehearsal.ARCH,)
        large = (arch, batch)
    start = time.perf_counter()
    end = start + 60 * minutes
    report: dict[str, Any] = {"environment": m.environment(device), "minutes": minutes}

    def so_far() -> None:
        report["seconds"] = time.perf_counter() - start
        report["targets"] = targets(report)
        keep(report)

    def measured(name: str, seconds: float) -> dict[str, Any]:
        if name == "step":
            found = report[name] = {}
            step.measure(found, device, seconds, rehearsal.groups() if tiny else None, so_far)
            return found
        if name == "breakdown":
            return breakdown.measure(device, seconds, arch, batch, "bf16" if gpu else "fp32")
        if name == "operations":
            kept = ("bf16", "fp32") if tiny or slow_products(device, "bf16") is None else ("fp32",)
            return {"steps": [roofline.measure(device, seconds / len(kept), arch, batch, p) for p in kept]}
        if name == "memory":
            return memory.measure(device, *large, "bf16" if gpu else "fp32")
        if name == "scaling":
            return step.scaling(device, seconds, rehearsal.SERIES if tiny else None)
        if name == "ops":
            return ops.measure(device, sizes=sizes, minutes=max(seconds, 1) / 60, compiled=False)
        from . import loader  # needs what the loaders need

        return loader.measure_with_step(device, arch, seconds, images=images, batch=batch)

    chosen = [name for name in SECTIONS if name in sections]
    for name in chosen:
        share = SECTIONS[name] / sum(SECTIONS[other] for other in chosen[chosen.index(name) :])
        seconds = max(share * (end - time.perf_counter()), 0.0)
        m.progress(f"{name}: {seconds:.0f} s")
        try:
            report[name] = measured(name, seconds)
        except Exception as error:  # one section must not cost the others their figures
            report[name] = {"not_measured": f"{type(error).__name__}: {m.first_line(error)}"}
        so_far()
    return report


def _sections(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


@command()
def main(arguments: list[str]) -> int:
    given = options(
        "report", __doc__, arguments, "out", "device", "dry_run",
        minutes={"type": float, "default": 9.0, "help": "time to spend (9)"},
        sections={"type": _sections, "default": tuple(SECTIONS), "help": f"some of {','.join(SECTIONS)}"},
        images={"type": Path, "help": "class folders or tar shards for the loader"},
        compare={"type": Path, "metavar": "OLD.json", "help": "fail if slower than this report"},
    )  # fmt: skip
    if unknown := [name for name in given.sections if name not in SECTIONS]:
        raise UserError(f"--sections has {unknown[0]!r}, which is none of {', '.join(SECTIONS)}")
    if not given.minutes > 0:
        raise UserError(f"--minutes must be positive, got {given.minutes}")
    if given.images is not None and not given.images.exists():
        raise UserError(f"there are no --images {given.images}: check the path")
    old = None if given.compare is None else json.loads(given.compare.read_text())
    device = m.resolve_device(given.device)
    if old is not None:
        check_comparable(old, m.device_name(device), torch.get_num_threads())
    out = results_folder(given.out, device)
    partial = out / "partial.json"  # a report that is cut short replaces no complete one
    checked = check(device)
    with rehearsal.rehearsal() if given.dry_run else nullcontext():
        try:
            report = measure(
                device,
                given.minutes,
                given.sections,
                given.images,
                given.dry_run,
                lambda so_far: write_json(so_far, partial),
            )
        except KeyboardInterrupt:
            m.progress(f"interrupted; what was measured: {partial}")
            return 130
    report["checked"] = checked
    write(report, to_markdown(report), out, "report")
    partial.unlink(missing_ok=True)
    wrong = sorted(failures(report))
    for failure in wrong:
        m.progress(f"not right: {failure}")
    wrong = [failure for failure in wrong if given.dry_run or "FAILED" in failure]
    lines, regressed = ([], False) if old is None else compare(report, old)
    print("\n".join(lines))
    return int(regressed or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
