"""What the Triton compiler makes of the kernels, on a machine without a GPU.

    python -m benchmarks.compile_report [--target sm_90] [--only refill]

The ops run on small CPU batches of realistic images, with the launches recorded instead of run: what is compiled
is what a GPU would be given. Printed per kernel, launch and target: registers, spilled bytes, shared memory and the
widest load and store of global memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from maskcf_fast.core.command import command

from .tables import options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPS = {
    name: import_module(f"maskcf_fast.ops.{name}.triton")
    for name in ("bias_gelu", "gather", "patchify", "refill", "relevance", "residual_norm", "select")
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any  # a JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, target: GPUTarget) -> Any:
        """Triton's compiled kernel for ``target``: what a launch does, up to where it would run."""
        gpu = SimpleNamespace(
            get_current_device=lambda: target, get_current_stream=lambda _: None, get_current_target=lambda: target
        )
        with patch.object(driver, "_active", gpu):
            return self.kernel.run(*self.args, grid=(1,), warmup=True, **self.options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect kernel launches instead of running them."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    with patch.object(JITFunction, "run", record):
        yield launches


@dataclass
class Facts:
    """What came out of the compiler for one launch on one target."""

    registers: int
    spills: int  # bytes of local memory per thread (AMD: registers)
    shared: int  # bytes
    load: int  # widest access of global memory, bytes
    store: int


def widest(text: str, pattern: str) -> int:
    """Bytes of the widest access that ``pattern`` (groups: vector, bits) finds."""
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(pattern, text)), default=0)


def facts(compiled: Any, target: GPUTarget) -> Facts:
    """Read the compiler's output."""
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_count: +(\d+)", text)
        (spills,) = re.findall(r"\.vgpr_spill_count: +(\d+)", text)
        width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}
        load, store = (
            max((width.get(kind, 0) for kind in re.findall(rf"(?:global|buffer)_{way}_(\w+?)\b", text)), default=0)
            for way in ("load", "store")
        )
        return Facts(int(registers), int(spills), shared, load, store)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (registers,), (stack,), (local,) = (re.findall(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    copies = r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], 0x([0-9a-f]+)"
    direct = widest(ptx, r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)")
    load = max([direct, *(int(size, 16) for size in re.findall(copies, ptx))])
    store = widest(ptx, r"st\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)")
    return Facts(int(registers), int(stack) + int(local), shared, load, store)


def calls() -> dict[str, Callable[[], Any]]:
    """Calls at realistic sizes, by name; two images do, since nothing compiled depends on the batch."""
    out: dict[str, Callable[[], Any]] = {}
    ops: Any = SimpleNamespace(**OPS)
    donors = torch.tensor([1, 0])
    for size, patch_size in ((224, 32), (224, 16), (224, 14), (336, 14)):
        side = size // patch_size
        cam, mask, several = (torch.zeros(2, side**2, dtype=kind) for kind in (torch.float32, torch.bool, torch.int64))
        tag = f"p{patch_size}@{size}"
        out[f"select threshold {tag}"] = partial(ops.select.select_patches, cam, 0.3, None, False)
        out[f"select top-k {tag}"] = partial(ops.select.select_patches, cam, None, 20, False)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            planes = torch.zeros(2, 3, size, size, dtype=dtype)
            pixels = planes.contiguous(memory_format=torch.channels_last)
            for layout, images in (("nchw", planes), ("nhwc", pixels)):
                name = f"{tag} {str(dtype)[6:]} {layout}"
                if size == 224:
                    out[f"refill {name}"] = partial(ops.refill.refill_patches, images, mask, donors, side, side)
                    out[f"refill multi {name}"] = partial(ops.refill.refill_patches, images, mask, several, side, side)
                fused = partial(
                    ops.refill.counterfactual_refill, images, cam, donors, context=False, rows=side, cols=side
                )
                out[f"refill fused threshold {name}"] = partial(fused, threshold=0.3, top_k=None)
                out[f"refill fused top-k {name}"] = partial(fused, threshold=None, top_k=20)
        for dtype in (torch.bfloat16, torch.float32):
            images = torch.zeros(2, size, size, 3, dtype=torch.uint8)
            name = f"{tag} {str(dtype)[6:]}"
            out[f"patchify {name}"] = partial(ops.patchify.patchify, images, patch_size, MEAN, STD, dtype, None, None)
            out[f"patchify refill {name}"] = partial(
                ops.patchify.patchify, images, patch_size, MEAN, STD, dtype, mask, donors
            )
    out["select top-k L=4096"] = partial(ops.select.select_patches, torch.zeros(2, 4096), None, 20, False)
    for width in (768, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            tokens, mask = torch.zeros(2, 50, width, dtype=dtype), torch.zeros(2, 49, dtype=torch.bool)
            for fill, which in (("single", donors), ("multi", torch.zeros(2, 49, dtype=torch.int64))):
                name = f"{fill} {width} {str(dtype)[6:]}"
                out[f"gather {name}"] = partial(ops.gather.gather_tokens, tokens, mask, which, 1)
                out[f"gather backward {name}"] = partial(ops.gather.gather_tokens_backward, tokens, mask, which, 1)
    for width in (3072, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            hidden, bias = torch.zeros(2, 50, width, dtype=dtype), torch.zeros(width)
            for kind, activation in enumerate(ops.bias_gelu.KINDS):
                name = f"{activation} {width} {str(dtype)[6:]}"
                out[f"bias_gelu {name}"] = partial(ops.bias_gelu.bias_gelu, hidden, bias, kind)
                out[f"bias_gelu backward {name}"] = partial(
                    ops.bias_gelu.bias_gelu_backward, hidden, hidden.clone(), bias, kind
                )
    for width in (384, 768, 1024, 1280, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            x, weight, name = torch.zeros(2, 50, width, dtype=dtype), torch.zeros(width), f"{width} {str(dtype)[6:]}"
            op = ops.residual_norm
            out[f"residual_norm {name}"] = partial(op.residual_norm, x, x.clone(), weight, weight.clone(), 1e-5)
            out[f"residual_norm backward {name}"] = partial(
                op.residual_norm_backward, x, x.clone(), x.clone(), weight, 1e-5
            )
    for d in (16, 24, 32, 48, 64, 72, 80, 128):
        for dtype in (torch.bfloat16, torch.float32):
            for queries in (50, 1):
                q, k = (torch.zeros(2, 12, t, d, dtype=dtype) for t in (queries, 50))
                name = f"relevance d{d} {str(dtype)[6:]}{' one query' if queries == 1 else ''}"
                row = torch.zeros(2, 50)
                out[name] = partial(ops.relevance.attention_relevance, q, k, k, q, row, d**-0.5)
    return out


def report(targets: list[str], only: str = "") -> Iterator[tuple[str, str, str, Facts]]:
    """``(call, kernel, target, facts)`` for every launch of the calls whose name holds ``only``."""
    for name, call in calls().items():
        if only not in name:
            continue
        with recorded() as launches:
            call()
        for launch in launches:
            for target in targets:
                compiled = launch.compile(TARGETS[target])
                yield name, launch.kernel.__name__, target, facts(compiled, TARGETS[target])


@command()
def main(arguments: list[str]) -> None:
    given = options(
        "compile_report", __doc__, arguments,
        target={"action": "append", "choices": TARGETS, "help": "may be given again; all when left out"},
        only={"default": "", "help": "text that the call's name must hold"},
    )  # fmt: skip
    line = "{:46} {:26} {:7} {:>4} {:>5} {:>6} {:>4} {:>5}"
    print(f"triton {triton.__version__}")
    print(line.format("call", "kernel", "target", "regs", "spill", "shared", "load", "store"))
    for name, kernel, target, found in report(given.target or list(TARGETS), given.only):
        print(line.format(name, kernel, target, *astuple(found)))


if __name__ == "__main__":
    sys.exit(main())
