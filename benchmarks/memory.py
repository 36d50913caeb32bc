"""Peak memory of one step, without timing it: what a large model needs on a machine where a round takes minutes.

python -m benchmarks.memory [--arch ViT-L/14] [--batch 2] [--precision fp32] [--device auto]
"""

from __future__ import annotations

import sys

from maskcf_fast.core.command import command
from maskcf_fast.models import preset

from . import measure as m
from .tables import number, options, table
from .workload import Variant, Workload

REPEATS = 2


def measure(work: Workload, precision: str) -> dict[str, int | None]:
    """Bytes above weights, gradients and moments, by way to compute the step; the least of some steps.

    The least, since on a CPU the system may take pages of libraries back and count them again when they are used.
    """
    found: dict[str, int | None] = {}
    for order in ("paper", "one graph", "two passes"):
        variant = Variant("object-single", order, precision=precision)
        found[str(variant)] = least(work, variant)
    work.student.transformer.recompute = "gelu"
    found[f"{variant}, GELU recomputed"] = least(work, variant)
    return found


def least(work: Workload, variant: Variant) -> int | None:
    """The least peak of some steps."""
    backward = work.backward(variant)
    peaks = [work.peak_memory(backward) for _ in range(REPEATS)]
    return None if None in peaks else min(p for p in peaks if p is not None)


@command()
def main(arguments: list[str]) -> None:
    given = options(
        "memory", __doc__, arguments, "device",
        arch={"default": "ViT-L/14", "help": "a preset (ViT-L/14)"},
        batch={"type": int, "default": 2, "help": "images (2)"},
        precision={"choices": ("fp32", "bf16"), "default": "fp32"},
    )  # fmt: skip
    found = measure(Workload(preset(given.arch), given.batch, m.resolve_device(given.device)), given.precision)
    paper = next(iter(found.values()))
    rows = [(v, number(peak, ".0f", 1e-6), number(peak and paper and peak / paper)) for v, peak in found.items()]
    print("\n".join(table(("step", "MB", "of the paper order's"), rows, left=1)))


if __name__ == "__main__":
    sys.exit(main())
