"""Every op against plain PyTorch, against ``torch.compile`` and against a plain copy, on this machine.

    python -m benchmarks.ops [--device cpu] [--ops attention_relevance] [--sizes ViT-L/14] [--minutes 2]
    python -m benchmarks.ops --choose     # which implementation is fastest here: the rows of ops/tuning.json to commit
    python -m benchmarks.ops --sweep      # which tiles of the Triton kernels are: likewise

Each implementation is first compared with the reference; one that differs is FAILED and has no figures. Variants
are timed in turns, round by round; ratios are medians over the rounds of the ratio within one round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskcf_fast.models import PRESETS
from maskcf_fast.ops.dispatch import DEVICES, IMPLEMENTATIONS, resolve, why_not

from . import measure as m
from .cases import CASES, OPS, SIZES, Case, make_case
from .tables import heading, number, table, target, target_table, write

BATCHES = {"cpu": (64,), "cuda": (64, 256, 1024)}
MINUTES = {"cpu": 7.0, "cuda": 8.0}
ROUNDS = (3, 31)
MAPS_ON_CPU = 2 << 30  # bytes of attention maps for which a CPU is asked; above it the batch is halved, as the row says

Row = dict[str, Any]  # of the results: a case at a size and a batch


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
            row: Row = {"op": op, "case": case, "size": size, "batch": n}
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
                rows.append(row | {"not_measured": f"{type(error).__name__}: {m.first_line(error)}"})
    finally:
        torch.set_num_threads(before)
    results["seconds"] = time.perf_counter() - start
    rows.reverse()
    return results | {"rows": rows, "targets": targets(rows, device.type)}


def measure_case(case: Case, device: torch.device, seconds: float, compiled: bool) -> Row:
    """Check, time and weigh every variant of a case, within about ``seconds``."""
    end = time.perf_counter() + seconds
    expected = case.expected()
    moved = case.moved(expected)
    variants: dict[str, Row] = {}
    calls = m.copies(moved, device)
    for copy in calls.values():
        copy()
    for name, function in candidates(case, device, compiled).items():
        if isinstance(function, str):
            variants[name] = {"unavailable": function}
            continue
        tolerance = case.tolerance if name in IMPLEMENTATIONS else case.eager_tolerance or case.tolerance
        try:
            variants[name] = {"check": compare(case.call(function), expected, tolerance)}
        except torch.OutOfMemoryError:
            variants[name] = {"unavailable": "out of memory"}
        except Exception as error:  # one variant must not cost the others their figures
            reason = f"{type(error).__name__}: {m.first_line(error)}"
            variants[name] = {"unavailable": reason} if name == "compiled" else {"check": f"FAILED: {reason}"}
        if variants[name].get("check") == "ok":
            calls[name] = partial(case.call, function)
    del expected
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what ran out of memory left it in pieces

    failed: dict[str, str] = {}
    samples = m.interleaved(calls, device, seconds=end - time.perf_counter(), rounds=ROUNDS, cold=True, failed=failed)
    for name in calls.keys() & variants.keys():
        if samples[name]:
            variants[name] |= figures(samples, name, moved) | {"peak_bytes": m.peak_memory(calls[name], device)}
        else:
            variants[name] = {"unavailable": failed[name]}
    return {
        "auto": resolve(case.package, "auto", device, case.limits, case.args[0].dtype),
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
    for impl in IMPLEMENTATIONS:
        reason = why_not(case.package, impl, device, case.limits)
        if reason is None and impl not in DEVICES[device.type]:
            reason = "runs under Triton's interpreter only, whose speed means nothing"
        found[impl] = m.first_line(reason) if reason else partial(case.op, impl=impl)
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


def figures(samples: dict[str, list[float]], name: str, moved: int) -> Row:
    """Time, bandwidth, share of a copy's speed, and how many times as fast as plain PyTorch."""
    times = samples[name]
    median = statistics.median(times)
    found: Row = {
        "ms": 1e3 * median,
        "iqr_ms": 1e3 * m.spread(times),
        "gb_s": moved / median / 1e9,
        "copy_share": m.ratio(samples["copy"], times),
        "bandwidth_share": m.ratio(samples["copy in place"], times),
    }
    if name in IMPLEMENTATIONS:
        others = [other for other in ("paper", "eager", "compiled") if samples.get(other)]
        found["times_as_fast"] = {other: m.ratio(samples[other], times) for other in others}
    return found


NOTES = """\
ms: median over the rounds, which take the variants in turn, and the interquartile range; on a GPU with a cold cache.
GB/s: every argument read once and every result written once, by the time. Of a copy: speed against
`torch.empty_like(x).copy_(x)` of as many bytes in the same rounds; of bandwidth: against `y.copy_(x)`, with `y` there
already (on a CPU, the system's handing out memory can take most of the former's time). × as fast: against the paper's
formula (a mask repeated to pixels, multiplied), against the better plain PyTorch (eager), and against that compiled.
MB: the highest point of memory during a call above its arguments, results included. `auto` takes the implementation in
bold.\
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
    """
    rows = [row for row in rows if "variants" in row]
    refills = [row for row in rows if row["op"] == "counterfactual_refill" and row["dtype"] == "float32"]
    refills = [row for row in refills if row["batch"] == max(r["batch"] for r in refills)]
    layers = [row for row in rows if row["op"] == "attention_relevance" and row["size"].startswith("ViT-L/14")]

    def values(rows: Sequence[Row], read: Callable[[Row, Row], float | None]) -> list[tuple[str, float]]:
        found = [(f"{r['size']}, N={r['batch']}", read(r["variants"][r["auto"]], r["variants"])) for r in rows]
        return [(where, value) for where, value in found if value is not None]

    def times(other: str) -> Callable[[Row, Row], float | None]:
        return lambda auto, _: auto.get("times_as_fast", {}).get(other)

    def memory(auto: Row, variants: Row) -> float | None:
        part, whole = auto.get("peak_bytes"), variants["eager"].get("peak_bytes")
        return part / whole if part is not None and whole else None

    def share(auto: Row, _: Row) -> float | None:
        return auto.get("copy_share") if kind == "cuda" else None

    refill, layer = "`counterfactual_refill`, float32", "`attention_relevance`, ViT-L/14"
    found = [
        (refills, target(f"{refill}: on a GPU, 0.9 of a copy's speed", values(refills, share), 0.9)),
        (refills, target(f"{refill}: 5 × as fast as the paper's formula", values(refills, times("paper")), 5)),
        (layers, target(f"{layer}: at most 0.1 of the maps' memory", values(layers, memory), 0.1, most=True)),
        (layers, target(f"{layer}: not slower than with maps", values(layers, times("eager")), 1)),
    ]
    for rows, line in found:
        wrong = [r for r in rows if r["variants"][r["auto"]].get("check", "ok") != "ok"]
        if wrong:
            line |= {"measured": f"FAILED at {wrong[0]['size']}, N={wrong[0]['batch']}", "state": "missed"}
    return [line for _, line in found]


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    copy = results["copy_gb_s"]
    moves = " and ".join(
        f"{copy[name]:.1f} GB/s into memory that is {where}"
        for name, where in (("copy", "new"), ("copy in place", "there"))
    )
    lines = [*heading("Ops", results), f"A copy moves {moves}.", "", *NOTES.splitlines(), "", *sections(results)]
    return "\n".join(lines) + "\n"


def sections(results: dict[str, Any], level: str = "##") -> list[str]:
    """The targets, a table per case, and what is not available."""
    lines = [f"{level} Targets", "", *target_table(results["targets"])]
    for title in dict.fromkeys((row["op"], row["case"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["op"], row["case"]) == title]
        cells = [cell for row in rows for cell in _cells(row)]
        lines += ["", f"{level} `{title[0]}`: {title[1]}", ""]
        lines += table(COLUMNS, cells, left=3) if cells else ["Not measured."]
    absent = list(_absent(results["rows"]))
    return lines + (["", f"{level} Not available", "", *absent] if absent else [])


def _cells(row: Row) -> Iterator[tuple[str, ...]]:
    """A line of the table for every variant that ran, a copy for comparison first."""
    if "variants" not in row:
        return
    where = (row["size"], str(row["batch"]))
    for label, ms in (("copy", row["copy_ms"]), ("copy in place", row["copy_in_place_ms"])):
        yield (*where, label, _milliseconds(ms), "", f"{row['moved_bytes'] / ms / 1e6:.1f}", *[""] * 6)
    for name, found in row["variants"].items():
        label = f"**{name}**" if name == row["auto"] else LABELS.get(name, name)
        if "ms" in found:
            ratios = found.get("times_as_fast", {})
            yield (
                *(*where, label, _milliseconds(found["ms"]), _milliseconds(found["iqr_ms"]), f"{found['gb_s']:.1f}"),
                *(f"{found[share]:.0%}" for share in ("copy_share", "bandwidth_share")),
                *(number(ratios.get(other)) for other in ("paper", "eager", "compiled")),
                "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e6:.1f}",
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


def _milliseconds(ms: float) -> str:
    """Three digits, without an exponent."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" if ms >= 0.001 else f"{ms:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/DEVICE)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=PRESETS, metavar="MODEL", help=", ".join(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="64; on a GPU also 256 and 1024")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--minutes", type=float, help="time to spend: 7 on a CPU, 8 on a GPU")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--choose", action="store_true", help="which implementation to take: write tuning.json")
    parser.add_argument("--sweep", action="store_true", help="which Triton tiles to take: write tuning.json")
    parser.add_argument("--dry-run", action="store_true", help="the same paths on this machine, with a tiny model")
    given = parser.parse_args(arguments)
    if given.dry_run:
        from . import rehearsal

        given.sizes, given.batch = (rehearsal.ARCH,), [rehearsal.BATCH]
        with rehearsal.rehearsal():
            return _run(given, parser)
    return _run(given, parser)


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    batches = tuple(given.batch) if given.batch else None
    try:
        config = Config(
            given.device, tuple(given.sizes), batches, tuple(given.ops), given.minutes, given.threads,
            not given.no_compile,
        )  # fmt: skip
        device = m.resolve_device(given.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    out = given.out or m.results_folder(device)
    out.mkdir(parents=True, exist_ok=True)  # before the measurement, not after: it may not be allowed

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if given.choose or given.sweep:
        from . import tune

        try:
            tune.run(config, out / "tuning.json", given.sweep, given.choose, progress, anywhere=given.dry_run)
        except ValueError as error:
            parser.error(str(error))
        return
    results = measure(config, progress)
    text = to_markdown(results)
    write(results, text, out, "ops")
    print(text)
    progress(f"Written: {out / 'ops.json'}, {out / 'ops.md'}")


if __name__ == "__main__":
    main()
