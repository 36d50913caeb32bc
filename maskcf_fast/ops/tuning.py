"""What is chosen per GPU: the order of an op's implementations, and the tile sizes of the Triton kernels.

Both stand in ``tuning.json``, a row each, with the measurement or the reason. ``python -m benchmarks.ops --choose`` and
``--sweep`` measure on the machine at hand and write the file with their rows put in; ``MASKCF_TUNING`` names another
file than the package's, so that what was measured can be used before it is committed.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tuning.json")
Row = dict[str, Any]  # as in the file: what it is for, "capability", what is chosen, "why"


@functools.cache
def table() -> dict[str, list[Row]]:
    """The file: ``"orders"`` and ``"tiles"``.

    Raises:
        ValueError: ``MASKCF_TUNING`` names no such file.
    """
    path = Path(os.environ.get("MASKCF_TUNING") or FILE)
    try:
        found = json.loads(path.read_text())
        return {kind: found[kind] for kind in ("orders", "tiles")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "take what `python -m benchmarks.ops --sweep` writes, or unset MASKCF_TUNING"
        raise ValueError(f"{path} is no table of orders and tiles ({error!r}): {remedy}") from error


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; ``(0, 0)``, for which every row stands that asks for none, without one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.get_device_capability(device)


def best(rows: Iterable[Row], device: torch.device) -> Row:
    """The row for the newest generation of GPUs that the device has reached; of those, the first."""
    return max((r for r in rows if tuple(r["capability"]) <= capability(device)), key=lambda r: r["capability"])


def order(op: str, dtype: torch.dtype | None, device: torch.device) -> tuple[str, ...]:
    """Implementations of ``op`` (such as ``"refill"``) for tensors of ``dtype`` on a GPU, the one to prefer first.

    A row for the op and the dtype goes before one for the op, and that before one for all ops.
    """
    name = str(dtype).removeprefix("torch.")

    def fits(row: Row, op: str | None, exact: bool) -> bool:
        return row["op"] == op and (name in row["dtypes"] if exact else not row["dtypes"])

    for which, exact in ((op, True), (op, False), (None, False)):
        rows = [row for row in table()["orders"] if fits(row, which, exact)]
        if any(tuple(row["capability"]) <= capability(device) for row in rows):
            return (*best(rows, device)["order"], "reference")
    raise AssertionError("the last row is for all ops")


def tiles(kernel: str, device: torch.device, **what: Any) -> dict[str, int]:
    """Tile sizes, warps and stages of a Triton kernel, by the names that its launch takes; ``what`` as in the row."""
    return dict(best((r for r in table()["tiles"] if r["kernel"] == kernel and r["for"] == what), device)["tiles"])


def with_rows(table: dict[str, list[Row]], kind: str, rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The table with rows put in, each in the place of the one that is for the same."""

    def key(row: Row) -> str:
        return json.dumps({name: row[name] for name in ("op", "dtypes", "kernel", "for", "capability") if name in row})

    merged = {key(row): row for row in (*table[kind], *rows)}
    return table | {kind: list(merged.values())}


def to_json(table: dict[str, list[Row]]) -> str:
    """The file's text, a line per row."""
    kinds = [
        f'"{kind}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]" for kind, rows in table.items()
    ]
    return "{" + ", ".join(kinds) + "}\n"
