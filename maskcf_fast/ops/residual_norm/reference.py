"""A residual sum and its LayerNorm in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_norm(
    x: Tensor,  # [..., D]
    branch: Tensor | None,  # like x
    weight: Tensor,  # [D], float32, or float64 with float64 x
    bias: Tensor,  # like weight
    eps: float,
) -> tuple[Tensor, Tensor]:  # both like x, contiguous; without a branch the first is empty, [0]
    """The sum, rounded, and its LayerNorm: in the weight's dtype, rounded once."""
    total = x if branch is None else (x + branch).contiguous()
    return x.new_empty(0) if branch is None else total, F.layer_norm(
        total.to(weight.dtype), weight.shape, weight, bias, eps
    ).to(x.dtype).contiguous()


def residual_norm_backward(
    grad_total: Tensor | None,  # [..., D], of the sum; None is zero
    grad_normed: Tensor,  # [..., D], of its LayerNorm
    total: Tensor,  # [..., D], the sum
    weight: Tensor,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # like x, contiguous, like weight, like weight
    """The gradient of ``x``, which is a branch's too, and those of ``weight`` and ``bias``."""
    z, grad = total.to(weight.dtype), grad_normed.to(weight.dtype)
    variance, mean = torch.var_mean(z, dim=-1, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    normed, weighted = (z - mean) * scale, grad * weight
    inner = weighted - weighted.mean(dim=-1, keepdim=True) - normed * (weighted * normed).mean(dim=-1, keepdim=True)
    found = scale * inner if grad_total is None else grad_total.to(weight.dtype) + scale * inner
    of_weight, of_bias = ((g.reshape(-1, len(weight)).sum(dim=0)) for g in (grad * normed, grad))
    return found.to(total.dtype).contiguous(), of_weight, of_bias
