"""Bias and GELU in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("gelu", "gelu_tanh", "quick_gelu")  # the schema counts them from 0; csrc/kernels.h repeats the order


def bias_gelu(
    x: Tensor,  # [..., D]
    bias: Tensor,  # [D], float32, or float64 with float64 x
    kind: int,  # of KINDS
) -> Tensor:  # like x, contiguous
    """``GELU(x + bias)``, computed in the bias's dtype and rounded once."""
    z = x.contiguous().to(bias.dtype) + bias
    if KINDS[kind] == "quick_gelu":
        return (F.silu(1.702 * z) / 1.702).to(x.dtype)  # x σ(1.702 x); its backward pass keeps one tensor, not two
    return F.gelu(z, approximate="tanh" if KINDS[kind] == "gelu_tanh" else "none").to(x.dtype)


def bias_gelu_backward(
    grad: Tensor,  # [..., D], of the result
    x: Tensor,  # [..., D]
    bias: Tensor,  # [D]
    kind: int,
) -> tuple[Tensor, Tensor]:  # like x, contiguous, like bias
    """The gradients of ``x`` and of ``bias``, the second from those of ``x`` before they are rounded."""
    z, wide = x.contiguous().to(bias.dtype) + bias, grad.contiguous().to(bias.dtype)
    if KINDS[kind] == "quick_gelu":
        s = torch.sigmoid(1.702 * z)
        found = wide * (s + 1.702 * z * s * (1 - s))
    else:
        found = torch.ops.aten.gelu_backward(wide, z, approximate="tanh" if KINDS[kind] == "gelu_tanh" else "none")
    return found.to(x.dtype), found.reshape(-1, len(bias)).sum(dim=0)
