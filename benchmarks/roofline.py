"""What the step would take on a GPU if every kernel ran at the memory's or the matrix units' rate, by kind of work.

    python -m benchmarks.roofline [--bandwidth 3.0 --matrix 790] > benchmarks/results/roofline.md
    python -m benchmarks.roofline --measure [--arch ViT-B/32 --batch 16]

The step in bf16 runs on tensors without data, so no GPU is needed and nothing is measured; the extension is, whose ops
stand for one kernel each. Each operation that PyTorch would launch counts the bytes of its arguments and results, once,
and its FLOPs; the longer of the two is its time. What launching takes, and that small kernels reach no rate, is left
out: it is the least that an eager step can take.

With ``--measure`` the step runs on the machine at hand, one operation after another, and what each kind took stands
beside that, at the rates of a large copy and a large product there.
"""

from __future__ import annotations

import statistics
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
from maskcf_fast.models import VisionTransformerConfig, preset
from maskcf_fast.ops import extension
from maskcf_fast.training.cost import complete_flop_counter

from . import measure as m
from .step import matrix_rate
from .tables import machine, options, table
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


def measured(
    config: VisionTransformerConfig, batch: int, device: torch.device, seconds: float, precision: str = "bf16"
) -> tuple[Work, float]:
    """A whole step's work with what it took: of each kind the median over steps; and a step as it runs by itself."""
    complete_flop_counter()
    bandwidth, matrix = rates(device)
    work = Workload(config, batch, device)
    step = work.step(work.backward(Variant("object-single", precision=precision)), keep=True)
    step()
    found, whole, end = [], [], time.perf_counter() + seconds
    for _ in m.rounds_until(end, (3, 15)):
        with Work(bandwidth, matrix[precision], device) as counted:
            step()
        found.append(counted)
        whole.append(m.timed(step, device))
    for kind in found[0].taken:
        found[0].taken[kind] = statistics.median(work.taken[kind] for work in found)
    return found[0], statistics.median(whole)


def rates(device: torch.device) -> tuple[float, dict[str, float]]:
    """Bytes per second of a large copy, and FLOP per second of a large product by precision."""
    total = 2**28 if device.type == "cpu" else 2**31
    copy = m.interleaved({"copy": m.copies(total, device)["copy in place"]}, device, seconds=1)["copy"]
    return total / min(copy), matrix_rate(device)


def rows_of(work: Work) -> list[tuple[str, ...]]:
    """By kind, what takes longest first, and all."""
    taken, total = any(work.taken.values()), sum(work.seconds.values())

    def row(kind: str, flops: float, moved: float, least: float, took: float) -> tuple[str, ...]:
        figures = (f"{flops / 1e12:.2f}", f"{moved / 1e9:.1f}", f"{1e3 * least:.1f}", f"{least / total:.0%}")
        return (kind, *figures, *((f"{1e3 * took:.1f}", f"{took / least:.1f}") if taken else ()))

    order = sorted(work.seconds, key=lambda kind: -(work.taken if taken else work.seconds)[kind])
    rows = [row(k, work.flops[k], work.bytes[k], work.seconds[k], work.taken[k]) for k in order]
    sums = (sum(part.values()) for part in (work.flops, work.bytes, work.seconds, work.taken))
    return [*rows, row("all", *sums)]


@command()
def main(arguments: list[str]) -> None:
    given = options(
        "roofline", __doc__, arguments, "device", "minutes",
        bandwidth={"type": float, "default": 3.0, "help": "of memory, TB/s (3.0)"},
        matrix={"type": float, "default": 790.0, "help": "of products in bf16, TFLOP/s (790)"},
        measure={"action": "store_true", "help": "run the step here"},
        arch={"default": "ViT-B/32", "help": "with --measure: a preset (ViT-B/32)"},
        batch={"type": int, "default": 16, "help": "with --measure: images (16)"},
        precision={"choices": ("fp32", "bf16"), "default": "bf16", "help": "with --measure (bf16)"},
    )  # fmt: skip
    columns = ("operations", "TFLOP", "GB", "ms at least", "share")
    if given.measure:
        device = m.resolve_device(given.device)
        work, whole = measured(preset(given.arch), given.batch, device, 60 * (given.minutes or 1), given.precision)
        print(f"{machine(m.environment(device))}\n\n## {given.arch}, {given.batch} images, {given.precision}\n")
        print("\n".join(table((*columns, "ms measured", "× least"), rows_of(work), left=1)))
        print(
            f"\nAt {work.bandwidth / 1e9:.1f} GB/s and {work.matrix / 1e9:.0f} GFLOP/s. The step by itself, without "
            f"a clock in between: {1e3 * whole:.0f} ms."
        )
        return
    print(f"At {given.bandwidth:g} TB/s and {given.matrix:g} TFLOP/s: predicted, not measured.")
    for arch, batch in CASES:
        work = work_of(arch, batch, given.bandwidth * 1e12, given.matrix * 1e12)
        total, flops = sum(work.seconds.values()), sum(work.flops.values())
        print(f"\n## {arch}, {batch} images\n")
        print("\n".join(table(columns, rows_of(work), left=1)))
        print(f"\nMatrix units in use, at most: {flops / (given.matrix * 1e12) / total:.0%}.")


if __name__ == "__main__":
    sys.exit(main())
