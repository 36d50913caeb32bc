"""What `maskcf_fast.ops.tuning` holds, measured on the machine at hand: ``benchmarks.ops --sweep`` and ``--choose``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from maskcf_fast.core.errors import UserError
from maskcf_fast.core.files import atomic_write
from maskcf_fast.models import preset
from maskcf_fast.ops import tuning
from maskcf_fast.ops.dispatch import DEVICES, why_not

from . import cases
from . import measure as m
from .ops import check

SIZES = ("ViT-B/16", "ViT-L/14")
BATCH = 256
ROUNDS = (3, 5)
HALF, SINGLE = torch.bfloat16, torch.float32
Make = Callable[..., cases.Case]
T = TypeVar("T")


def _refills(dtype: torch.dtype) -> list[Make]:
    fused: Make = partial(cases.counterfactual, dtype=dtype)
    return [*(partial(cases.refill, dtype=dtype, fill=fill) for fill in ("single", "multi")), fused]


# By op and the dtypes that a row is for, the calls that decide.
CALLS: dict[tuple[str, tuple[str, ...]], tuple[Make, ...]] = {
    ("select", ()): (cases.select_threshold, cases.select_top_k),
    ("refill", ("uint8",)): (*_refills(torch.uint8),),
    ("refill", ("float32",)): (*_refills(SINGLE),),
    ("patchify", ()): (cases.patchify,),
    ("gather", ()): tuple(partial(cases.gather, fill=fill) for fill in ("single", "multi")),
    ("bias_gelu", ()): (cases.bias_gelu,),
    ("residual_norm", ()): (cases.residual_norm,),
    ("relevance", ("float16", "bfloat16")): (partial(cases.relevance, dtype=HALF),),
    ("relevance", ("float32",)): (partial(cases.relevance, dtype=SINGLE),),
}


def _tiles(*names: str) -> Callable[..., list[dict[str, int]]]:
    return lambda *rows: [dict(zip(names, row, strict=True)) for row in rows]


# By kernel and what its row is for: calls that decide, and at most five configurations.
KERNELS: list[tuple[str, dict[str, Any], tuple[Make, ...], list[dict[str, int]]]] = [
    ("select", {}, CALLS["select", ()], _tiles("WARP_PATCHES", "num_warps")((256, 16), (128, 16), (64, 16), (512, 16))),
    ("refill", {}, CALLS["refill", ("float32",)], _tiles("UNITS", "STEPS", "num_warps")(
        (512, 4, 4), (512, 1, 4), (256, 4, 4), (512, 8, 4), (1024, 2, 8))),
    ("patchify", {}, CALLS["patchify", ()], _tiles("BLOCK", "num_warps")((2048, 4), (1024, 4), (1024, 2), (4096, 8))),
    ("gather", {}, CALLS["gather", ()], _tiles("UNITS", "num_warps")((512, 4), (256, 4), (512, 2), (1024, 8))),
    ("gather backward", {}, CALLS["gather", ()], _tiles("BLOCK", "num_warps")((2048, 4), (1024, 2), (512, 1))),
    ("bias_gelu", {}, CALLS["bias_gelu", ()], _tiles("ROWS", "COLS", "num_warps")(
        (16, 256, 4), (8, 256, 4), (32, 256, 8), (8, 512, 4), (16, 128, 4))),
    ("residual_norm", {}, CALLS["residual_norm", ()], _tiles("num_warps")((4,), (2,), (1,))),
    ("residual_norm backward", {}, CALLS["residual_norm", ()], _tiles("ROWS", "num_warps")(
        (32, 4), (16, 4), (64, 4), (32, 2))),
    ("relevance", {"half": True, "width": 64}, CALLS["relevance", ("float16", "bfloat16")],
     _tiles("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")(
        (32, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 2))),
    ("relevance", {"half": False, "width": 64}, CALLS["relevance", ("float32",)],
     _tiles("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")(
        (16, 64, 4, 2), (16, 64, 4, 3), (16, 32, 4, 2), (32, 64, 8, 2))),
    ("relevance of one query", {}, (partial(cases.relevance, dtype=HALF, queries=1),),
     _tiles("BLOCK_K", "num_warps", "num_stages")((64, 4, 2), (32, 4, 2), (128, 4, 2), (64, 2, 2))),
]  # fmt: skip


def run(
    device: torch.device,
    sizes: Sequence[str],
    batch: int,
    path: Path,
    sweep: bool,
    choose: bool,
    anywhere: bool = False,
) -> None:
    """Write the package's table to ``path``, which ``MASKCF_TUNING`` takes, with this machine's rows put in.

    Args:
        device: A GPU.
        sizes: Presets of models.
        batch: Images.
        path: Of the file.
        sweep: Whether to measure the Triton kernels' tiles; with ``choose``, the winners are what is then chosen from.
        choose: Whether to measure the order of implementations.
        anywhere: On a CPU too, where it chooses between what is there: a rehearsal.

    Raises:
        UserError: The device is no GPU.
    """
    if device.type != "cuda" and not anywhere:
        raise UserError(f"tiles and orders are chosen for a GPU, and the device is {device}")
    where = (device, sizes, batch)
    table = tuning.table()
    if sweep:
        table = tuning.with_rows(table, "tiles", _swept(*where))
    if choose:
        with patch.object(tuning, "table", lambda: table):
            table = tuning.with_rows(table, "orders", list(_chosen(*where)))
    atomic_write(path, tuning.to_json(table).encode())
    here = [row for rows in table.values() for row in rows if row["why"].endswith(m.device_name(device))]
    print("\n".join(f"{row.get('op') or row.get('kernel')}: {row['why']}" for row in here))
    m.progress(f"Written: {path}; MASKCF_TUNING={path} uses it, to commit it copy it over {tuning.FILE}")


def _swept(device: torch.device, sizes: Sequence[str], batch: int) -> Iterator[tuning.Row]:
    for kernel, what, makers, configurations in KERNELS:
        m.progress(f"sweep: {kernel} {what or ''}")

        def timed(i: int, kernel: str = kernel, makers: Any = makers, tried: Any = configurations) -> float:
            with patch.object(tuning, "tiles", instead_of(kernel, tried[i])):
                return milliseconds(makers, "triton", device, sizes, batch)

        if found := _fastest(range(len(configurations)), timed):
            times = ", ".join(f"{ms:.4g} ms for {list(configurations[i].values())}" for i, ms in found.items())
            yield {
                "kernel": kernel, "for": what, "capability": list(tuning.capability(device)),
                "tiles": configurations[next(iter(found))], "why": _why(times, sizes, batch, device),
            }  # fmt: skip


def instead_of(kernel: str, tiles: dict[str, int]) -> Callable[..., dict[str, int]]:
    """`tuning.tiles`, with others for one kernel."""
    before = tuning.tiles
    return lambda name, device, **what: dict(tiles) if name == kernel else before(name, device, **what)


def _chosen(device: torch.device, sizes: Sequence[str], batch: int) -> Iterator[tuning.Row]:
    for (op, dtypes), makers in CALLS.items():
        m.progress(f"choose: {op} {', '.join(dtypes)}")

        def timed(impl: str, op: str = op, makers: Any = makers) -> float:
            if reason := why_not(f"maskcf_fast.ops.{op}", impl, device):
                raise RuntimeError(reason)
            return milliseconds(makers, impl, device, sizes, batch)

        impls = [impl for impl in DEVICES[device.type] if impl != "reference" or device.type == "cpu"]
        if found := _fastest(impls, timed):
            times = ", ".join(f"{impl} {ms:.4g} ms" for impl, ms in found.items())
            yield {
                "op": op, "dtypes": list(dtypes), "capability": list(tuning.capability(device)),
                "order": list(found), "why": _why(times, sizes, batch, device),
            }  # fmt: skip


def _fastest(candidates: Iterable[T], timed: Callable[[T], float]) -> dict[T, float]:
    """Each candidate's time, the shortest first, without those that raise."""
    found: dict[T, float] = {}
    for candidate in candidates:
        try:
            found[candidate] = timed(candidate)
        except Exception as error:  # does not compile, or differs: the others are still worth having
            m.progress(f"  {candidate}: {m.first_line(error)}")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def milliseconds(makers: Sequence[Make], impl: str, device: torch.device, sizes: Sequence[str], batch: int) -> float:
    """Geometric mean over the calls and sizes, after each was held against the reference."""
    times = []
    for size in sizes:
        for make in makers:
            torch.manual_seed(0)
            case = make(preset(size), batch, device)
            function = partial(case.op, impl=impl)
            status = check(case, impl, function, case.expected())
            if status != "ok":
                raise RuntimeError(f"{size}: {status}")
            call = {impl: partial(case.call, function)}
            samples = m.interleaved(call, device, seconds=0, rounds=ROUNDS, cold=True)
            times.append(m.summary(samples[impl])["ms"])
    return statistics.geometric_mean(times)


def _why(times: str, sizes: Sequence[str], batch: int, device: torch.device) -> str:
    return f"{times}: {' and '.join(sizes)}, N={batch}, torch {torch.__version__}, {m.device_name(device)}"
