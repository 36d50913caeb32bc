"""What the Triton compiler makes of the kernels, on a machine without a GPU.

    python -m benchmarks.compile_report [--target sm_90] [--only refill]

The ops run on small CPU batches of realistic images, with the launches recorded instead of run: what is compiled
is what a GPU would be given. Printed per kernel, launch and target: registers, spilled bytes, shared memory and the
widest load and store of global memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, type_canonicalisation_dict

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPS = {
    name: import_module(f"maskcf_fast.ops.{name}.triton")
    for name in ("gather", "patchify", "refill", "relevance", "select")
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any  # a JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """What Triton would compile for these arguments on a GPU."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.args[i] if i < len(self.args) else self.options[parameter.name]
            free = not parameter.do_not_specialize
            if parameter.is_constexpr or (free and type(value) is int and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
                continue
            if isinstance(value, Tensor):
                signature[parameter.name] = "*" + type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = free and value % 16 == 0
            else:
                assert isinstance(value, float)
                signature[parameter.name], aligned = "fp32", False
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, target: GPUTarget) -> Any:
        """Triton's compiled kernel for ``target``."""
        names = {parameter.name for parameter in self.kernel.params}
        options = {name: value for name, value in self.options.items() if name not in names}
        return triton.compile(self.source(), target=target, options=options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect kernel launches instead of running them."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


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
    for size, patch in ((224, 32), (224, 16), (224, 14), (336, 14)):
        side = size // patch
        cam, mask, several = (torch.zeros(2, side**2, dtype=kind) for kind in (torch.float32, torch.bool, torch.int64))
        tag = f"p{patch}@{size}"
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
            out[f"patchify {name}"] = partial(ops.patchify.patchify, images, patch, MEAN, STD, dtype, None, None)
            out[f"patchify refill {name}"] = partial(
                ops.patchify.patchify, images, patch, MEAN, STD, dtype, mask, donors
            )
    out["select top-k L=4096"] = partial(ops.select.select_patches, torch.zeros(2, 4096), None, 20, False)
    for width in (768, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            tokens, mask = torch.zeros(2, 50, width, dtype=dtype), torch.zeros(2, 49, dtype=torch.bool)
            for fill, which in (("single", donors), ("multi", torch.zeros(2, 49, dtype=torch.int64))):
                name = f"{fill} {width} {str(dtype)[6:]}"
                out[f"gather {name}"] = partial(ops.gather.gather_tokens, tokens, mask, which, 1)
                out[f"gather backward {name}"] = partial(ops.gather.gather_tokens_backward, tokens, mask, which, 1)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be given again; all when left out")
    parser.add_argument("--only", default="", help="text that the call's name must hold")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}")
    print(f"{'call':46} {'kernel':26} {'target':7} {'regs':>4} {'spill':>5} {'shared':>6} {'load':>4} {'store':>5}")
    for name, kernel, target, found in report(arguments.target or list(TARGETS), arguments.only):
        print(
            f"{name:46} {kernel:26} {target:7} {found.registers:4} {found.spills:5} {found.shared:6} "
            f"{found.load:4} {found.store:5}"
        )


if __name__ == "__main__":
    main()
