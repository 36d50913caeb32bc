"""Choosing an implementation, the same way for every op.

An op's folder holds one module per kind of implementation, each with the same functions: ``reference`` (plain
PyTorch, any device), ``native`` (the compiled extension: C++ on a CPU, CUDA on a GPU) and ``triton``.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, util
from typing import Any

import torch

from ..core.names import did_you_mean
from . import extension, tuning

# Module of each implementation. "auto" takes the first that can run: on a GPU in the order of `tuning`.
MODULES = {"cuda": "native", "cpu": "native", "triton": "triton", "reference": "reference"}
DEVICES = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


def implementation(
    op: str, impl: str, device: torch.device, sizes: tuple[Any, ...] = (), *, dtype: torch.dtype | None = None
) -> Any:
    """The module that implements ``op`` for tensors on ``device``.

    Args:
        op: Package of the op, such as ``"maskcf_fast.ops.select"``.
        impl: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.
        device: Where the op's tensors live.
        sizes: What else an implementation may be limited in, as its function ``lacks(impl, device, *sizes)`` takes it.
        dtype: Of the tensors, where the order of preference depends on it.

    Raises:
        ValueError: ``impl`` is no implementation (the nearest is suggested), or not for this device.
        RuntimeError: ``impl`` cannot run here; says why.
    """
    return sys.modules[f"{op}.{MODULES[resolve(op, impl, device, sizes, dtype)]}"]


def resolve(
    op: str, impl: str, device: torch.device, sizes: tuple[Any, ...] = (), dtype: torch.dtype | None = None
) -> str:
    """The implementation to take, ``impl`` itself unless it is ``"auto"``; its module is imported."""
    if impl == "auto":
        order = DEVICES.get(device.type, ("reference",))
        if device.type == "cuda":
            order = tuning.order(op.rpartition(".")[2], dtype, device)
        impl = next(i for i in order if why_not(op, i, device, sizes) is None)
    elif impl not in MODULES:
        raise ValueError(
            f"impl must be one of 'auto', {', '.join(map(repr, MODULES))}, got {impl!r}"
            + did_you_mean(impl, ["auto", *MODULES])
        )
    elif reason := why_not(op, impl, device, sizes):
        raise RuntimeError(f"{op.rpartition('.')[2]} cannot run with impl={impl!r} on {device}: {reason}")
    import_module(f"{op}.{MODULES[impl]}")
    return impl


# What torch.compiler.assume_constant_result does, without its import of the compiler: while tracing, the answer is
# a constant, which it is, since it depends on nothing that changes.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(op: str, impl: str, device: torch.device, sizes: tuple[Any, ...] = ()) -> str | None:
    """Why ``impl`` of ``op`` cannot run on ``device`` (for these sizes, if given); None if it can."""
    if impl == "reference":
        return None
    if util.find_spec(f"{op}.{MODULES[impl]}") is None:
        return "not implemented"
    # Under Triton's interpreter its kernels run on the CPU, for tests.
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    wanted = "cpu" if impl == "cpu" else "cuda"
    emulated = impl == "cuda" and extension.emulated()  # so do the extension's, in another test
    if device.type != wanted and not (interpreted or emulated):
        return f"it is for tensors on {wanted}"
    if impl == "triton" and util.find_spec("triton") is None:
        return "triton is not installed"
    if impl != "triton" and (reason := extension.why_not(impl)):
        return reason
    lacks = getattr(import_module(f"{op}.{MODULES[impl]}"), "lacks", None) if sizes else None
    return lacks(impl, device, *sizes) if lacks else None
