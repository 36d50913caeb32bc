"""Peak memory of one step, without timing it: what a large model needs on a machine where a round takes minutes.

python -m benchmarks.memory [--arch ViT-L/14] [--batch 2] [--precision fp32] [--device auto]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from maskcf_fast.models import VisionTransformerConfig, preset

from . import measure as m
from .page import name
from .tables import number, table
from .workload import Variant, Workload

ORDERS = ("paper", "one graph", "two passes")
REPEATS = 2


def measure(config: VisionTransformerConfig, batch: int, precision: str, device: str) -> list[dict[str, Any]]:
    """A row per way to compute the step; ``peak_bytes`` above weights, gradients and moments, the least of some steps.

    The least, since on a CPU the system may take pages of libraries back and count them again when they are used.
    """
    work = Workload(config, batch, m.resolve_device(device))
    rows = []
    for order in ORDERS:
        variant = Variant("object-single", order, precision=precision)
        backward = work.backward(variant)
        peaks = [work.peak_memory(backward) for _ in range(REPEATS)]
        rows.append(variant._asdict() | {"peak_bytes": None if None in peaks else min(p for p in peaks if p)})
    return rows


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table, with each step's memory by the paper order's."""
    found = [(name(row), row["peak_bytes"] or 0) for row in rows]
    cells = [(what, number(peak, ".0f", 1e-6), number(peak and peak / found[0][1])) for what, peak in found]
    return "\n".join(table(("step", "MB", "of the paper order's"), cells, left=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="ViT-L/14", help="a preset (ViT-L/14)")
    parser.add_argument("--batch", type=int, default=2, help="images (2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    given = parser.parse_args(arguments)
    try:
        rows = measure(preset(given.arch), given.batch, given.precision, given.device)
    except ValueError as error:
        parser.error(str(error))
    print(to_markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
