"""What the step would take on a GPU if every kernel ran at the memory's or the matrix units' rate, by kind of work.

    python -m benchmarks.roofline [--bandwidth 3.0 --matrix 790] > benchmarks/results/roofline.md

The step in bf16 runs on tensors without data, so no GPU is needed and nothing is measured; the extension is, whose ops
stand for one kernel each. Each operation that PyTorch
would launch counts the bytes of its arguments and results, once, and its FLOPs; the longer of the two is its time. What
launching takes, and that small kernels reach no rate, is left out: it is the least that an eager step can take.
"""

from __future__ import annotations

import sys
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

from .tables import options, table
from .workload import Variant, Workload

CASES = (("ViT-B/32", 256), ("ViT-B/16", 256), ("ViT-L/14", 128))
KINDS = {  # by what an operation's name holds, the first that fits
    "products": ("mm",),
    "attention": ("scaled_dot_product",),
    "relevance": ("relevance",),
    "GELU": ("gelu", "silu"),
    "LayerNorm": ("layer_norm",),
    "casts and copies": ("copy", "clone", "cat", "gather_tokens"),
    "clip and AdamW": ("_foreach", "adam", "linalg_vector_norm"),
}
REST = "sums and the rest"


class Work(TorchDispatchMode):
    """Bytes, FLOPs and seconds of the operations under it, by kind."""

    def __init__(self, bandwidth: float, matrix: float) -> None:
        super().__init__()
        self.bandwidth, self.matrix = bandwidth, matrix
        self.bytes: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
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
        return out


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
        rows = [
            (kind, f"{work.flops[kind] / 1e12:.2f}", f"{work.bytes[kind] / 1e9:.1f}",
             f"{1e3 * seconds:.1f}", f"{seconds / total:.0%}")
            for kind, seconds in sorted(work.seconds.items(), key=lambda item: -item[1])
        ]  # fmt: skip
        rows.append(("all", f"{flops / 1e12:.2f}", f"{sum(work.bytes.values()) / 1e9:.1f}", f"{1e3 * total:.1f}", ""))
        print(f"\n## {arch}, {batch} images\n")
        print("\n".join(table(("operations", "TFLOP", "GB", "ms at least", "share"), rows, left=1)))
        print(f"\nMatrix units in use, at most: {flops / (given.matrix * 1e12) / total:.0%}.")


if __name__ == "__main__":
    sys.exit(main())
