"""Choosing an implementation, the same way for every op.

An op's folder holds one module per kind of implementation, each with the same functions: ``reference`` (plain
PyTorch, any device), ``native`` (the compiled extension: C++ on a CPU, CUDA on a GPU) and ``triton``.
"""

from __future__ import annotations

import difflib
from importlib import import_module, util
from typing import Any

import torch

# Module of each implementation. "auto" takes the first that is there, in the order of the device.
MODULES = {"cuda": "native", "cpu": "native", "triton": "triton", "reference": "reference"}
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


def implementation(op: str, impl: str, device: torch.device) -> Any:
    """The module that implements ``op`` for tensors on ``device``.

    Args:
        op: Package of the op, such as ``"maskcf_fast.ops.select"``.
        impl: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.
        device: Where the op's tensors live.

    Raises:
        ValueError: ``impl`` is no implementation (the nearest is suggested), or not for this device.
        RuntimeError: ``impl`` cannot run here; says why.
    """
    if impl == "auto":
        impl = next(i for i in ORDER.get(device.type, ("reference",)) if why_not(op, i, device) is None)
    elif impl not in MODULES:
        near = difflib.get_close_matches(impl, ["auto", *MODULES], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"impl must be one of 'auto', {', '.join(map(repr, MODULES))}, got {impl!r}{hint}")
    elif reason := why_not(op, impl, device):
        raise RuntimeError(f"{op.rpartition('.')[2]} cannot run with impl={impl!r} on {device}: {reason}")
    return import_module(f"{op}.{MODULES[impl]}")


def why_not(op: str, impl: str, device: torch.device) -> str | None:
    """Why ``impl`` of ``op`` cannot run on ``device``; None if it can."""
    if impl != "reference" and util.find_spec(f"{op}.{MODULES[impl]}") is None:
        return "not implemented"
    return None
