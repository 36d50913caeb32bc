"""Every op against plain PyTorch, against ``torch.compile`` and against a plain copy, on this machine.

    python -m benchmarks.ops [--device cpu] [--ops attention_relevance] [--sizes ViT-L/14] [--minutes 2]

Each implementation is first compared with the reference; one that differs is FAILED and has no figures. Variants
are timed in turns, round by round; ratios are medians over the rounds of the ratio within one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskcf_fast.core.files import atomic_write
from maskcf_fast.models import PRESETS
from maskcf_fast.ops.dispatch import DEVICES, MODULES, resolve, why_not

from . import measure as m
from .cases import CASES, OPS, SIZES, Case, make_case
from .ops_report import targets, to_markdown

BATCHES = {"cpu": (64,), "cuda": (64, 256, 1024)}
MINUTES = {"cpu": 7.0, "cuda": 8.0}
ROUNDS = (3, 31)
MAPS_ON_CPU = 2 << 30  # bytes of attention maps for which a CPU is asked; above it the batch is halved, as the row says


@dataclass(frozen=True)
class Config:
    """What to measure; the defaults are the whole table.

    Attributes:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        sizes: Presets of `maskcf_fast.VisionTransformer`.
        batches: Batch sizes; None for 64, and on a GPU also 256 and 1024. A CPU is given fewer images where attention
            maps would take more than 2 GiB; the row says how many.
        ops: Public functions, of `benchmarks.cases.OPS`.
        minutes: Time to spend; what does not fit is named as not measured. None for 7 on a CPU, 8 on a GPU.
        threads: Threads of torch on the CPU; None leaves them.
        compiled: Whether to compile the plain PyTorch as well (at the largest batch size).
    """

    device: str = "auto"
    sizes: tuple[str, ...] = SIZES
    batches: tuple[int, ...] | None = None
    ops: tuple[str, ...] = OPS
    minutes: float | None = None
    threads: int | None = None
    compiled: bool = True

    def __post_init__(self) -> None:
        for name, given, known in (("sizes", self.sizes, tuple(PRESETS)), ("ops", self.ops, OPS)):
            if unknown := [x for x in given if x not in known]:
                raise ValueError(f"{name} has {unknown[0]!r}, which is none of {', '.join(known)}")
        if self.batches is not None and min(self.batches, default=0) < 2:
            raise ValueError(f"batches must be 2 or more (a donor is another image), got {self.batches}")
        for field in ("minutes", "threads"):
            if (value := getattr(self, field)) is not None and value <= 0:
                raise ValueError(f"{field} must be positive, got {value}")


def measure(config: Config, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure the table.

    Returns:
        What ``ops.json`` holds: ``environment``, ``settings``, ``copy_gb_s``, ``rows`` (one per case, size and
        batch, with ``variants`` by name) and ``targets``. `to_markdown` renders it.

    Raises:
        ValueError: A device that is not there.
    """
    device = m.resolve_device(config.device)
    batches = config.batches or BATCHES[device.type]
    minutes = config.minutes or MINUTES[device.type]
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        start = time.perf_counter()
        results: dict[str, Any] = {
            "environment": m.environment(device),
            "settings": asdict(config) | {"device": str(device), "batches": batches, "minutes": minutes},
            "copy_gb_s": m.copy_bandwidth(device),
        }
        todo = [(*key, size, n) for key in CASES if key[0] in config.ops for size in config.sizes for n in batches]
        rows = []
        # The most expensive first: the cheap ones can make do with what time is left.
        for i, (op, case, size, n) in enumerate(reversed(todo)):
            left = start + 60 * minutes - time.perf_counter()
            row = {"op": op, "case": case, "size": size, "batch": n}
            progress(f"{i + 1}/{len(todo)} {op}, {case}, {size}, N={n} ({max(left, 0):.0f} s left)")
            if left <= 0:
                rows.append(row | {"not_measured": f"the {minutes:g} minutes were over"})
                continue
            compiled = config.compiled and n == max(batches)
            try:
                made = make_case(op, case, size, n, device)
                while device.type == "cpu" and made.written_out > MAPS_ON_CPU and n > 2:  # minutes for one case else
                    n //= 2
                    made = make_case(op, case, size, n, device)
                row["batch"] = n
                rows.append(row | measure_case(made, device, left / (len(todo) - i), compiled))
            except RuntimeError as error:  # such as no memory for the arguments: the other rows are still worth having
                rows.append(row | {"not_measured": f"{type(error).__name__}: {first_line(error)}"})
    finally:
        torch.set_num_threads(before)
    results["seconds"] = time.perf_counter() - start
    rows.reverse()
    return results | {"rows": rows, "targets": targets(rows, device.type)}


def measure_case(case: Case, device: torch.device, seconds: float, compiled: bool) -> dict[str, Any]:
    """Check, time and weigh every variant of a case, within about ``seconds``."""
    end = time.perf_counter() + seconds
    expected = case.expected()
    moved = case.moved(expected)
    variants: dict[str, dict[str, Any]] = {}
    calls = m.copies(moved, device)
    for copy in calls.values():
        copy()
    for name, function in candidates(case, device, compiled).items():
        if isinstance(function, str):
            variants[name] = {"unavailable": function}
            continue
        tolerance = case.tolerance if name in MODULES else case.eager_tolerance or case.tolerance
        try:
            variants[name] = {"check": compare(case.call(function), expected, tolerance)}
        except torch.OutOfMemoryError:
            variants[name] = {"unavailable": "out of memory"}
        except Exception as error:  # one variant must not cost the others their figures
            reason = f"{type(error).__name__}: {first_line(error)}"
            variants[name] = {"unavailable": reason} if name == "compiled" else {"check": f"FAILED: {reason}"}
        if variants[name].get("check") == "ok":
            calls[name] = partial(case.call, function)
    del expected
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what ran out of memory left it in pieces

    samples = m.interleaved(calls, device, seconds=end - time.perf_counter(), rounds=ROUNDS)
    for name in calls.keys() & variants.keys():
        variants[name] |= figures(samples, name, moved) | {"peak_bytes": m.peak_memory(calls[name], device)}
    return {
        "auto": resolve(case.package, "auto", device, case.limits),
        "dtype": str(case.args[0].dtype).removeprefix("torch."),
        "moved_bytes": moved,
        "rounds": len(samples["copy"]),
        "copy_ms": 1e3 * statistics.median(samples["copy"]),
        "copy_in_place_ms": 1e3 * statistics.median(samples["copy in place"]),
        "variants": variants,
    }


def candidates(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[..., Any] | str]:
    """Every variant by name: a function of the case's arguments, or why there is none."""
    found: dict[str, Callable[..., Any] | str] = {}
    for impl in MODULES:
        reason = why_not(case.package, impl, device, case.limits)
        if reason is None and impl not in DEVICES[device.type]:
            reason = "runs under Triton's interpreter only, whose speed means nothing"
        found[impl] = first_line(reason) if reason else partial(case.op, impl=impl)
    found.update(case.eager)
    if compiled:
        torch.compiler.reset()  # each case is the first of its shape: static code, and no limit on recompilations
        found["compiled"] = torch.compile(case.eager["eager"], dynamic=False)
    free = m.free_memory(device)
    if device.type == "cpu" and free is not None and case.written_out > free:  # the system would kill the process
        reason = f"needs about {case.written_out / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        found |= dict.fromkeys(found.keys() & {"reference", "paper", "eager", "compiled"}, reason)
    return found


def compare(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: tuple[float, ...]) -> str:
    """``"ok"``, or what is wrong with the results, after FAILED."""
    for i, (have, want, allowed) in enumerate(zip(results, expected, tolerance, strict=True)):
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"FAILED: result {i} is {have.dtype} {list(have.shape)}, not {want.dtype} {list(want.shape)}"
        if allowed == 0 and not torch.equal(have, want):
            return f"FAILED: result {i} differs in {int((have != want).sum())} of {want.numel()} values"
        if allowed > 0:
            error = float((have.float() - want.float()).abs().amax() / want.float().abs().amax())
            if not error <= allowed:  # NaN is no number to pass
                return f"FAILED: result {i} is off by {error:.1e} of its largest value, {allowed:.0e} are allowed"
    return "ok"


def figures(samples: dict[str, list[float]], name: str, moved: int) -> dict[str, Any]:
    """Time, bandwidth, share of a copy's speed, and how many times as fast as plain PyTorch."""
    times = samples[name]
    median = statistics.median(times)
    found: dict[str, Any] = {
        "ms": 1e3 * median,
        "iqr_ms": 1e3 * m.spread(times),
        "gb_s": moved / median / 1e9,
        "copy_share": m.ratio(samples["copy"], times),
        "bandwidth_share": m.ratio(samples["copy in place"], times),
    }
    if name in MODULES:
        others = [other for other in ("paper", "eager", "compiled") if other in samples]
        found["times_as_fast"] = {other: m.ratio(samples[other], times) for other in others}
    return found


def first_line(reason: object) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(reason).splitlines() if line.strip()), "no reason given")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of ops.json and ops.md (benchmarks/results/DEVICE)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=PRESETS, metavar="MODEL", help=", ".join(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="64; on a GPU also 256 and 1024")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--minutes", type=float, help="time to spend: 7 on a CPU, 8 on a GPU")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    batches = tuple(given.batch) if given.batch else None
    try:
        config = Config(
            given.device, tuple(given.sizes), batches, tuple(given.ops), given.minutes, given.threads,
            not given.no_compile,
        )  # fmt: skip
        device = m.resolve_device(given.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    out = given.out or Path(__file__).parent / "results" / m.slug(m.device_name(device))
    out.mkdir(parents=True, exist_ok=True)  # before the measurement, not after: it may not be allowed

    results = measure(config, progress=lambda line: print(line, file=sys.stderr, flush=True))
    text = to_markdown(results)
    atomic_write(out / "ops.json", json.dumps(results, indent=1).encode())
    atomic_write(out / "ops.md", text.encode())
    print(text)
    print(f"Written: {out / 'ops.json'}, {out / 'ops.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
