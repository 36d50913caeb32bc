"""Bias and GELU in one pass over memory each way, and the bias's gradient in the backward one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_batch, check_tensor, shown
from ...core.names import did_you_mean
from ..dispatch import define, differentiable, implementation
from . import reference

define(reference.bias_gelu)
define(reference.bias_gelu_backward)


def bias_gelu(x: Tensor, bias: Tensor, activation: str = "gelu", *, impl: str = "auto") -> Tensor:
    """``GELU(x + bias)``: what follows a product without bias, ``bias_gelu(F.linear(h, weight), bias)``.

    Computed in float32 (float64 for float64) and rounded once, whatever autocast is on. The backward pass recomputes
    from ``x``, which is all that is kept, and sums up the bias's gradient on the way, in a fixed order. Differentiable
    in both, also twice and by `torch.func.grad`; for `torch.func.vmap` and forward-mode derivatives there is
    ``impl="reference"``.

    Args:
        x: ``[..., D]``, any float dtype.
        bias: ``[D]``, any float dtype.
        activation: ``"gelu"``, its approximation by tanh ``"gelu_tanh"``, or OpenAI's ``"quick_gelu"``,
            ``x σ(1.702 x)``.
        impl: ``"auto"``, or the name of an implementation. While `torch.compile` traces, ``"auto"`` is plain PyTorch,
            which the compiler makes one kernel of, with what is around it.

    Returns:
        A new tensor like ``x``.

    Raises:
        TypeError: An argument is no tensor or has the wrong dtype.
        ValueError: Wrong shapes or devices, or an unknown activation (the nearest is suggested).
    """
    check_tensor("x", x, ["...", "D"], dtypes=FLOATS)
    check_tensor("bias", bias, ["D"], dtypes=FLOATS, device=x.device)
    check_batch("bias", bias)
    if len(bias) != x.shape[-1]:
        raise ValueError(f"bias must have shape [{x.shape[-1]}], as the rows of x, got [{len(bias)}]")
    if activation not in reference.KINDS:
        known = ", ".join(map(repr, reference.KINDS))
        raise ValueError(
            f"activation must be one of {known}, got {shown(activation)}{did_you_mean(activation, reference.KINDS)}"
        )
    kind, bias = (
        reference.KINDS.index(activation),
        bias.to(torch.float64 if x.dtype == torch.float64 else torch.float32),
    )
    impl = "reference" if impl == "auto" and torch.compiler.is_compiling() else impl
    run = implementation(reference.bias_gelu, impl, x.device, dtype=x.dtype)
    return run(x, bias, kind) if run is reference.bias_gelu else _BiasGelu.apply(x, bias, kind, run, impl)


@differentiable
class _BiasGelu(torch.autograd.Function):
    # Not an autograd kernel of the op, which torch.func cannot look into.

    @staticmethod
    def forward(x: Tensor, bias: Tensor, kind: int, run: Callable[..., Tensor], impl: str) -> Tensor:
        return run(x, bias, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.kind, _, ctx.impl = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        # Where this is to be differentiated in turn, by what can be.
        impl = "reference" if torch.is_grad_enabled() else ctx.impl
        run = implementation(reference.bias_gelu_backward, impl, x.device, dtype=x.dtype)
        return *run(grads[0], x, bias, ctx.kind), None, None, None
