"""What the step would take on a GPU if every kernel ran at the memory's or the matrix units' rate, by kind of work.

    python -m benchmarks.roofline [--bandwidth 3.0 --matrix 790] > benchmarks/results/roofline.md

The step in bf16 runs on tensors without data, so no GPU is needed and nothing is measured; the extension is, whose ops
stand for one kernel each. Each operation that PyTorch would launch counts the bytes of its arguments and results, once,
and its FLOPs; the longer of the two is its time. What launching takes, and that small kernels reach no rate, is left
out: it is the least that an eager step can take.

`benchmarks.report` runs the step, one operation after another, and puts what each kind took beside that, at the rates
of a large copy and a large product of the machine at hand.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from maskcf_fast.core.command import command
from maskcf_fast.core.errors import UserError
from maskcf_fast.models import preset
from maskcf_fast.ops import extension
from maskcf_fast.training.cost import complete_flop_counter

from . import measure as m
from .step import matrix_rate
from .tables import options, table
from .workload import Variant, Workload

CASES = (("ViT-B/32", 256), ("ViT-B/16", 256), ("ViT-L/14", 128))
KINDS = {  # by what an operation's name holds, the first that fits
    "products": ("mm",),
    "attention": ("scaled_dot_product",),
    "relevance": ("relevance",),
    "GELU": ("gelu", "silu"),
    "sums and LayerNorm": ("layer_norm", "residual_norm"),
    "casts and copies": ("copy", "clone", "cat", "gather_tokens"),
    "clip and AdamW": ("_foreach", "adam", "linalg_vector_norm"),
}
REST = "the rest"
ROUNDS = (3, 15)


class Work(TorchDispatchMode):
    """Bytes, FLOPs and seconds of the operations under it, by kind; with a device, also what they take there."""

    def __init__(self, bandwidth: float, matrix: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.bandwidth, self.matrix, self.device = bandwidth, matrix, device
        self.taken: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start = self._now()
        out = func(*args, **(kwargs or {}))
        taken = self._now() - start
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        places = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in places]
        changed = [
            x for declared, value in zip(func._schema.arguments, args, strict=False)
            if declared.alias_info is not None and declared.alias_info.is_write
            for x in tree_leaves(value) if isinstance(x, Tensor)
        ]  # fmt: skip
        if not (given and (new or changed)):  # a view, or fresh memory
            return out
        kind = next((kind for kind, parts in KINDS.items() if any(p in func.name() for p in parts)), REST)
        moved = sum(x.numel() * x.element_size() for x in (*given, *new, *changed))
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        self.bytes[kind] += moved
        self.flops[kind] += flops
        self.seconds[kind] += max(moved / self.bandwidth, flops / self.matrix)
        self.taken[kind] += taken
        return out

    def _now(self) -> float:
        if self.device is None:
            return 0.0
        m.synchronize(self.device)
        return time.perf_counter()


def work_of(arch: str, batch: int, bandwidth: float, matrix: float, method: str = "object-single") -> Work:
    """A whole step's work.

    Args:
        arch: A preset.
        batch: Images.
        bandwidth: Of memory, bytes per second.
        matrix: Of products, FLOP per second.
        method: A masking strategy.

    Raises:
        UserError: The extension is not built.
    """
    if reason := extension.why_not("cpu"):
        raise UserError(f"the fused ops cannot be told from plain PyTorch: {reason}")
    complete_flop_counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        work = Workload(preset(arch), batch, torch.device("cpu"))
        step = work.step(work.backward(Variant(method, precision="bf16")), keep=True)
        step()  # makes gradients and moments
        with Work(bandwidth, matrix) as found:
            step()
    return found


def measure(device: torch.device, seconds: float, arch: str, batch: int, precision: str) -> dict[str, Any]:
    """A whole step's work and what it took, operation by operation, each waited for.

    Returns:
        ``kinds``: name, flops, bytes, ``least_ms`` at the machine's rates, and ``ms``, the median over steps, of what
        takes longest first; ``bandwidth`` and ``matrix`` are those rates, ``whole_ms`` is the step run by itself.
    """
    complete_flop_counter()
    where = {"arch": arch, "batch": batch, "method": "object-single", "precision": precision}
    end = time.perf_counter() + seconds
    bandwidth, matrix = rates(device)
    work = Workload(preset(arch), batch, device)
    step = work.step(work.backward(Variant("object-single", precision=precision)), keep=True)
    step()
    found, whole = [], []
    for _ in m.rounds_until(end, ROUNDS):
        with Work(bandwidth, matrix[precision], device) as counted:
            step()
        found.append(counted)
        whole.append(m.timed(step, device))
    taken = {kind: m.summary([work.taken[kind] for work in found]) for kind in found[0].taken}
    rates_here = {"bandwidth": bandwidth, "matrix": matrix[precision], "whole_ms": m.summary(whole)["ms"]}
    return where | rates_here | {"kinds": kinds_of(found[0], taken)}


def rates(device: torch.device) -> tuple[float, dict[str, float]]:
    """Bytes per second of a large copy, and FLOP per second of a large product by precision."""
    total = 2**28 if device.type == "cpu" else 2**31
    copy = m.interleaved({"copy": m.copies(total, device)["copy in place"]}, device, seconds=1)["copy"]
    return total / min(copy), matrix_rate(device)


def kinds_of(work: Work, taken: dict[str, dict[str, float]] | None = None) -> list[dict[str, Any]]:
    """Name, FLOPs, bytes and least time of each kind, what takes longest first; with what each took."""
    kinds = [
        {"name": kind, "flops": work.flops[kind], "bytes": work.bytes[kind], "least_ms": 1e3 * least}
        | ({} if taken is None else taken[kind])
        for kind, least in work.seconds.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.get("ms", kind["least_ms"]))


def kinds_table(kinds: list[dict[str, Any]]) -> list[str]:
    """A line for every kind, and one for all."""
    keys = [key for key in ("flops", "bytes", "least_ms", "ms") if key in kinds[0]]
    total = {"name": "all"} | {key: sum(kind[key] for kind in kinds) for key in keys}
    rows = []
    for kind in (*kinds, total):
        row = [kind["name"], f"{kind['flops'] / 1e12:.2f}", f"{kind['bytes'] / 1e9:.1f}", f"{kind['least_ms']:.1f}"]
        share = kind.get("ms", kind["least_ms"]) / total.get("ms", total["least_ms"])
        measured = [f"{kind['ms']:.1f}", f"{kind['ms'] / kind['least_ms']:.1f}"] if "ms" in kind else []
        rows.append([*row, *measured, f"{share:.0%}"])
    columns = ("operations", "TFLOP", "GB", "ms at least", *(("ms measured", "× least") if "ms" in total else ()))
    return table((*columns, "share"), rows, left=1)


@command()
def main(arguments: list[str]) -> None:
    given = options(
        "roofline", __doc__, arguments,
        bandwidth={"type": float, "default": 3.0, "help": "of memory, TB/s (3.0)"},
        matrix={"type": float, "default": 790.0, "help": "of products in bf16, TFLOP/s (790)"},
    )  # fmt: skip
    print(f"At {given.bandwidth:g} TB/s and {given.matrix:g} TFLOP/s: predicted, not measured.")
    for arch, batch in CASES:
        work = work_of(arch, batch, given.bandwidth * 1e12, given.matrix * 1e12)
        total, flops = sum(work.seconds.values()), sum(work.flops.values())
        print(f"\n## {arch}, {batch} images\n")
        print("\n".join(kinds_table(kinds_of(work))))
        print(f"\nMatrix units in use, at most: {flops / (given.matrix * 1e12) / total:.0%}.")


if __name__ == "__main__":
    sys.exit(main())
