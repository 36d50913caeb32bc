"""Every op against plain PyTorch, against ``torch.compile`` and against a plain copy, on this machine.

    python -m benchmarks.ops [--device cpu] [--ops attention_relevance] [--sizes ViT-L/14] [--minutes 2]
    python -m benchmarks.ops --choose     # which implementation is fastest here: the rows of ops/tuning.json to commit
    python -m benchmarks.ops --sweep      # which tiles of the Triton kernels are: likewise

Each implementation is first compared with the reference; one that differs is FAILED and has no figures. Variants
are timed in turns, round by round; ratios are medians over the rounds of the ratio within one round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskcf_fast.core.command import command
from maskcf_fast.core.errors import UserError
from maskcf_fast.models import PRESETS
from maskcf_fast.ops.dispatch import DEVICES, IMPLEMENTATIONS, resolve, why_not

from . import measure as m
from .cases import CASES, OPS, SIZES, Case, make_case
from .tables import digits, heading, number, options, results_folder, table, target, target_table, write

BATCHES = {"cpu": (64,), "cuda": (64, 256, 1024)}
MINUTES = {"cpu": 7.0, "cuda": 8.0}
ROUNDS = (3, 31)
MAPS_ON_CPU = 2 << 30  # bytes of attention maps for which a CPU is asked; above it the batch is halved, as the row says
PLAIN = {"paper": "paper's formula", "eager": "eager", "compiled": "torch.compile"}

Row = dict[str, Any]  # of the results: a case at a size and a batch


def measure(
    device: torch.device,
    *,
    sizes: Sequence[str] = SIZES,
    batches: Sequence[int] | None = None,
    names: Sequence[str] = OPS,
    minutes: float | None = None,
    compiled: bool = True,
) -> dict[str, Any]:
    """Measure the table.

    Args:
        device: Where.
        sizes: Presets of `maskcf_fast.VisionTransformer`.
        batches: Batch sizes; None for 64, and on a GPU also 256 and 1024. A CPU is given fewer images where attention
            maps would take more than 2 GiB; the row says how many.
        names: Public functions, of `benchmarks.cases.OPS`.
        minutes: Time to spend; what does not fit is named as not measured. None for 7 on a CPU, 8 on a GPU.
        compiled: Whether to compile the plain PyTorch as well (at the largest batch size).

    Returns:
        What ``ops.json`` holds: ``environment``, ``seconds``, ``rows`` (one per case, size and batch, with
        ``variants`` by name) and ``targets``.

    Raises:
        UserError: A batch of one image.
    """
    batches = batches or BATCHES[device.type]
    if min(batches) < 2:
        raise UserError(f"--batch must be 2 or more (a donor is another image), got {min(batches)}")
    start = time.perf_counter()
    end = start + 60 * (minutes or MINUTES[device.type])
    results: dict[str, Any] = {"environment": m.environment(device)}
    todo = [(*key, size, n) for key in CASES if key[0] in names for size in sizes for n in batches]
    rows: list[Row] = []
    # The most expensive first: the cheap ones can make do with what time is left.
    for i, (op, case, size, n) in enumerate(reversed(todo)):
        left = end - time.perf_counter()
        row: Row = {"op": op, "case": case, "size": size, "batch": n}
        m.progress(f"{i + 1}/{len(todo)} {op}, {case}, {size}, N={n} ({max(left, 0):.0f} s left)")
        if left <= 0:
            rows.append(row | {"not_measured": "the time was over"})
            continue
        try:
            made = make_case(op, case, size, n, device)
            while device.type == "cpu" and made.written_out > MAPS_ON_CPU and n > 2:  # minutes for one case else
                n //= 2
                made = make_case(op, case, size, n, device)
            row["batch"] = n
            rows.append(row | measure_case(made, device, left / (len(todo) - i), compiled and n == max(batches)))
        except RuntimeError as error:  # such as no memory for the arguments: the other rows are still worth having
            rows.append(row | {"not_measured": f"{type(error).__name__}: {m.first_line(error)}"})
    rows.reverse()
    return results | {"seconds": time.perf_counter() - start, "rows": rows, "targets": targets(rows, device.type)}


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
        try:
            variants[name] = {"check": check(case, name, function, expected)}
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
        "copy_ms": m.summary(samples["copy"])["ms"],
        "copy_in_place_ms": m.summary(samples["copy in place"])["ms"],
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
        found |= dict.fromkeys(found.keys() & {"reference", *PLAIN}, reason)
    return found


def check(case: Case, name: str, function: Callable[..., Any], expected: tuple[Tensor, ...]) -> str:
    """``"ok"``, or after FAILED how a variant's results differ from those of the reference."""
    tolerance = case.tolerance if name in IMPLEMENTATIONS else case.eager_tolerance or case.tolerance
    for have, want, allowed in zip(case.call(function), expected, tolerance, strict=True):
        try:
            atol = allowed * float(want.abs().amax()) if allowed else 0.0
            torch.testing.assert_close(have, want, rtol=0.0, atol=atol)
        except AssertionError as error:
            lines = str(error).splitlines()
            return f"FAILED: {' '.join(line for line in lines if line and 'difference' not in line)}"
    return "ok"


def figures(samples: dict[str, list[float]], name: str, moved: int) -> Row:
    """Time, bandwidth, share of a copy's speed, and how many times as fast as plain PyTorch."""
    times = samples[name]
    found: Row = m.summary(times)
    found["gb_s"] = moved / found["ms"] / 1e6
    found["copy_share"], found["bandwidth_share"] = (
        m.ratio(samples[copy], times) for copy in ("copy", "copy in place")
    )
    if name in IMPLEMENTATIONS:
        found["times_as_fast"] = {other: m.ratio(samples[other], times) for other in PLAIN if samples.get(other)}
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


def targets(rows: Sequence[Row], kind: str) -> list[dict[str, str]]:
    """What the ops are meant to reach, what was measured, and ``"met"``, ``"missed"`` or ``"not measured"``.

    Held against them is what ``auto`` takes: for the refill at the largest batch of each size, since a small one
    waits for the launch; for relevance at every batch.
    """
    rows = [row for row in rows if "variants" in row]
    refills = [row for row in rows if row["op"] == "counterfactual_refill" and row["dtype"] == "float32"]
    refills = [row for row in refills if row["batch"] == max(r["batch"] for r in refills)]
    layers = [row for row in rows if row["op"] == "attention_relevance" and row["size"].startswith("ViT-L/14")]

    def memory(row: Row) -> float | None:
        part, whole = (row["variants"][name].get("peak_bytes") for name in (row["auto"], "eager"))
        return part / whole if part is not None and whole else None

    def auto(row: Row, key: str) -> Any:
        return row["variants"][row["auto"]].get(key)

    def line(
        text: str, rows: Sequence[Row], read: Callable[[Row], float | None], bound: float, most: bool = False
    ) -> Any:
        found = [(f"{row['size']}, N={row['batch']}", read(row)) for row in rows]
        made = target(text, [(where, value) for where, value in found if value is not None], bound, most=most)
        if wrong := [row for row in rows if (auto(row, "check") or "ok") != "ok"]:
            made |= {"measured": f"FAILED at {wrong[0]['size']}, N={wrong[0]['batch']}", "state": "missed"}
        return made

    refill, layer = "`counterfactual_refill`, float32", "`attention_relevance`, ViT-L/14"
    return [
        line(f"{refill}: on a GPU, 0.9 of a copy's speed", refills,
             lambda row: auto(row, "copy_share") if kind == "cuda" else None, 0.9),
        line(f"{refill}: 5 × as fast as the paper's formula", refills,
             lambda row: (auto(row, "times_as_fast") or {}).get("paper"), 5),
        line(f"{layer}: at most 0.1 of the maps' memory", layers, memory, 0.1, most=True),
        line(f"{layer}: not slower than with maps", layers,
             lambda row: (auto(row, "times_as_fast") or {}).get("eager"), 1),
    ]  # fmt: skip


def sections(results: dict[str, Any], level: str = "##") -> list[str]:
    """The targets, a table per case, and what is not available."""
    lines = [f"{level} Targets", "", *target_table(results["targets"])]
    for title in dict.fromkeys((row["op"], row["case"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["op"], row["case"]) == title and "variants" in row]
        cells = [cell for row in rows for cell in _cells(row)]
        lines += ["", f"{level} `{title[0]}`: {title[1]}", ""]
        lines += table(COLUMNS, cells, left=3) if cells else ["Not measured."]
    absent = list(_absent(results["rows"]))
    return lines + (["", f"{level} Not available", "", *absent] if absent else [])


def _cells(row: Row) -> Iterator[tuple[str, ...]]:
    """A line of the table for every variant that ran, a copy for comparison first."""
    where = (row["size"], str(row["batch"]))
    for label, ms in (("copy", row["copy_ms"]), ("copy in place", row["copy_in_place_ms"])):
        yield (*where, label, digits(ms), "", f"{row['moved_bytes'] / ms / 1e6:.1f}", *[""] * 6)
    for name, found in row["variants"].items():
        label = f"**{name}**" if name == row["auto"] else PLAIN.get(name, name)
        if "ms" in found:
            ratios = found.get("times_as_fast", {})
            yield (
                *(*where, label, digits(found["ms"]), digits(found["iqr_ms"]), f"{found['gb_s']:.1f}"),
                *(f"{found[share]:.0%}" for share in ("copy_share", "bandwidth_share")),
                *(number(ratios.get(other)) for other in PLAIN),
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
                found.setdefault((variant["unavailable"], f"{PLAIN.get(name, name)} of "), {})[place] = None
    for (reason, what), places in found.items():
        yield f"- {what}{', '.join(places)}: {reason}"


@command()
def main(arguments: list[str]) -> None:
    given = options(
        "ops", __doc__, arguments, "out", "device", "minutes", "dry_run",
        sizes={"nargs": "+", "default": SIZES, "choices": PRESETS, "metavar": "MODEL", "help": ", ".join(SIZES)},
        batch={"nargs": "+", "type": int, "metavar": "N", "help": "64; on a GPU also 256 and 1024"},
        ops={"nargs": "+", "default": OPS, "choices": OPS, "metavar": "OP", "help": ", ".join(OPS)},
        threads={"type": int, "default": torch.get_num_threads(), "help": "threads of torch on the CPU"},
        no_compile={"action": "store_true", "help": "leave torch.compile out"},
        choose={"action": "store_true", "help": "which implementation to take: write tuning.json"},
        sweep={"action": "store_true", "help": "which Triton tiles to take: write tuning.json"},
    )  # fmt: skip
    from . import rehearsal, tune

    if given.dry_run:
        given.sizes, given.batch = (rehearsal.ARCH,), [rehearsal.BATCH]
    device = m.resolve_device(given.device)
    torch.set_num_threads(given.threads)
    out = results_folder(given.out, device)
    with rehearsal.rehearsal() if given.dry_run else nullcontext():
        if given.choose or given.sweep:
            sizes = tune.SIZES if given.sizes == SIZES else given.sizes
            batch = max(given.batch or [tune.BATCH])
            tune.run(device, sizes, batch, out / "tuning.json", given.sweep, given.choose, anywhere=given.dry_run)
            return
        results = measure(
            device, sizes=given.sizes, batches=given.batch, names=given.ops, minutes=given.minutes,
            compiled=not given.no_compile,
        )  # fmt: skip
    write(
        results, "\n".join([*heading("Ops", results), *NOTES.splitlines(), "", *sections(results)]) + "\n", out, "ops"
    )


if __name__ == "__main__":
    sys.exit(main())
