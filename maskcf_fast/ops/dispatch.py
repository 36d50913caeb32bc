"""An op's schema, shapes and kernels, registered once; and choosing among its implementations, alike for all ops.

An op's folder holds its contract in ``reference.py``, a function of tensors and numbers in plain PyTorch. Its signature
is the op's schema, and what it makes of fake tensors are the shapes under `torch.compile`. `define` puts both into two
namespaces of PyTorch's dispatcher: ``maskcf``, where the compiled extension has its kernels (C++ for tensors on a CPU,
CUDA for those on a GPU), and ``maskcf_triton``, whose kernel is the function of the same name in ``triton.py``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from importlib import import_module, util
from typing import Any

import torch

from ..core.names import did_you_mean
from . import extension, tuning

NAMESPACES = {"cuda": "maskcf", "cpu": "maskcf", "triton": "maskcf_triton"}
IMPLEMENTATIONS = (*NAMESPACES, "reference")
# "auto" takes the first that can run: on a GPU in the order of `tuning`.
DEVICES = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
# What to call, by package of the op, name, and namespace ("reference" for the contract itself).
CALLS: dict[str, dict[str, dict[str, Callable[..., Any]]]] = {}


def define(contract: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Register an op of the contract's name, signature and shapes; what to call, by namespace."""
    package, name = contract.__module__.rpartition(".")[0], contract.__name__
    schema = torch.library.infer_schema(contract, mutates_args=())
    calls: dict[str, Callable[..., Any]] = {"reference": contract}
    for namespace in set(NAMESPACES.values()):
        torch.library.define(f"{namespace}::{name}", schema)
        torch.library.register_fake(f"{namespace}::{name}", contract)
        calls[namespace] = getattr(getattr(torch.ops, namespace), name).default

    @torch.library.impl(f"maskcf_triton::{name}", "default")  # any device: under Triton's interpreter it is the CPU
    def _(*arguments: Any) -> Any:
        return getattr(import_module(f"{package}.triton"), name)(*arguments)

    CALLS.setdefault(package, {})[name] = calls
    return calls


def differentiable(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Keep the signature of its ``forward``, which PyTorch would work out anew at every call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def implementation(
    contract: Callable[..., Any],
    impl: str,
    device: torch.device,
    sizes: tuple[Any, ...] = (),
    *,
    dtype: torch.dtype | None = None,
) -> Callable[..., Any]:
    """What to call for tensors on ``device``, with the arguments of the contract.

    Args:
        contract: The function in the op's ``reference.py``.
        impl: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.
        device: Where the op's tensors live.
        sizes: What else an implementation may be limited in, as the function ``lacks(impl, device, *sizes)`` of the
            op's package takes it.
        dtype: Of the tensors, where the order of preference depends on it.

    Raises:
        ValueError: ``impl`` is no implementation (the nearest is suggested), or not for this device.
        RuntimeError: ``impl`` cannot run here; says why.
    """
    package = contract.__module__.rpartition(".")[0]
    chosen = resolve(package, impl, device, sizes, dtype)
    return CALLS[package][contract.__name__][NAMESPACES.get(chosen, chosen)]


def resolve(
    op: str, impl: str, device: torch.device, sizes: tuple[Any, ...] = (), dtype: torch.dtype | None = None
) -> str:
    """The implementation of a package such as ``"maskcf_fast.ops.select"``: ``impl`` itself unless it is ``"auto"``."""
    if impl == "auto":
        order = DEVICES.get(device.type, ("reference",))
        if device.type == "cuda":
            order = tuning.order(op.rpartition(".")[2], dtype, device)
        return next(i for i in order if why_not(op, i, device, sizes) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl must be one of 'auto', {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}"
            + did_you_mean(impl, ["auto", *IMPLEMENTATIONS])
        )
    if reason := why_not(op, impl, device, sizes):
        raise RuntimeError(f"{op.rpartition('.')[2]} cannot run with impl={impl!r} on {device}: {reason}")
    return impl


# What torch.compiler.assume_constant_result does, without its import of the compiler: while tracing, the answer is
# a constant, which it is, since it depends on nothing that changes.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(op: str, impl: str, device: torch.device, sizes: tuple[Any, ...] = ()) -> str | None:
    """Why ``impl`` of a package cannot run on ``device`` (for these sizes, if given); None if it can."""
    if impl == "reference":
        return None
    # Under Triton's interpreter its kernels run on the CPU, for tests.
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    wanted = "cpu" if impl == "cpu" else "cuda"
    emulated = impl == "cuda" and extension.emulated()  # so do the extension's, in another test
    if device.type != wanted and not (interpreted or emulated):
        return f"it is for tensors on {wanted}"
    if impl != "triton":
        reason = extension.why_not(impl, next(iter(CALLS[op])))
    elif util.find_spec("triton") is None:
        reason = "triton is not installed"
    else:
        reason = None if util.find_spec(f"{op}.triton") else "not implemented"
    lacks = getattr(import_module(op), "lacks", None) if sizes else None
    return reason or (lacks(impl, device, *sizes) if lacks else None)
