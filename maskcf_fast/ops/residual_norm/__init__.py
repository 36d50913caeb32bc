"""A residual sum and its LayerNorm in one pass over memory each way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_batch, check_number, check_tensor
from ..dispatch import define, differentiable, implementation
from . import reference

define(reference.residual_norm)
define(reference.residual_norm_backward)


def residual_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``x + branch``, and the LayerNorm of that: what lies between the halves of a pre-norm transformer block.

    The sum is rounded to ``x``'s dtype; its LayerNorm is computed in float32 (float64 for float64) and rounded once,
    whatever autocast is on. The backward pass recomputes the statistics from the sum, which is all that is kept, and
    sums up the weight's and the bias's gradients on the way, in a fixed order. Differentiable in all four, also twice
    and by `torch.func.grad`; for `torch.func.vmap` and forward-mode derivatives there is ``impl="reference"``.

    Args:
        x: ``[..., D]``, any float dtype.
        branch: Like ``x``; None is zero.
        weight: ``[D]``, any float dtype.
        bias: ``[D]``, any float dtype.
        eps: Added to the variance.
        impl: ``"auto"``, or the name of an implementation. While `torch.compile` traces, ``"auto"`` is plain PyTorch,
            which the compiler makes one kernel of, with what is around it.

    Returns:
        The sum and its LayerNorm, new tensors like ``x``; without a branch, ``x`` itself and its LayerNorm.

    Raises:
        TypeError: An argument is no tensor or has the wrong dtype.
        ValueError: Wrong shapes or devices, or ``eps`` below 0 or infinite.
    """
    check_tensor("x", x, ["...", "D"], dtypes=FLOATS)
    if branch is not None:
        check_tensor("branch", branch, ["...", "D"], dtypes=[x.dtype], device=x.device)
        if branch.shape != x.shape:
            raise ValueError(f"branch must have the shape of x, {list(x.shape)}, got {list(branch.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(name, tensor, ["D"], dtypes=FLOATS, device=x.device)
        check_batch(name, tensor)
        if len(tensor) != x.shape[-1]:
            raise ValueError(f"{name} must have shape [{x.shape[-1]}], as the rows of x, got [{len(tensor)}]")
    if not 0 <= check_number("eps", eps) < math.inf:
        raise ValueError(f"eps must be a finite number, at least 0, got {eps!r}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    impl = "reference" if impl == "auto" and torch.compiler.is_compiling() else impl
    run = implementation(reference.residual_norm, impl, x.device, dtype=x.dtype)
    arguments = (x, branch, weight.to(wide), bias.to(wide), float(eps))
    total, normed = run(*arguments) if run is reference.residual_norm else _ResidualNorm.apply(*arguments, run, impl)
    return x if branch is None else total, normed


@differentiable
class _ResidualNorm(torch.autograd.Function):
    # Not an autograd kernel of the op, which torch.func cannot look into.

    @staticmethod
    def forward(
        x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, run: Callable[..., Any], impl: str
    ) -> tuple[Tensor, Tensor]:
        return run(x, branch, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.alone = inputs[1] is None
        ctx.save_for_backward(inputs[0] if ctx.alone else output[0], inputs[2])
        ctx.eps, _, ctx.impl = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        # Where this is to be differentiated in turn, by what can be.
        impl = "reference" if torch.is_grad_enabled() else ctx.impl
        run = implementation(reference.residual_norm_backward, impl, total.device, dtype=total.dtype)
        of_total = None if ctx.alone else grads[0]
        grad, of_weight, of_bias = run(of_total, grads[1], total, weight, ctx.eps)
        return grad, None if ctx.alone else grad, of_weight, of_bias, None, None, None
