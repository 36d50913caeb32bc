"""Attention relevance in plain PyTorch, with the attention map written out: the contract."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_relevance(
    q: Tensor,  # [N, H, Tq, d], Tq = T or 1; one float dtype for q, k, v and grad_out
    k: Tensor,  # [N, H, T, d]
    v: Tensor,  # [N, H, T, d]
    grad_out: Tensor,  # [N, H, Tq, d]
    relevance: Tensor,  # [N, T] float32, or float64 with float64
    scale: float,
) -> Tensor:  # [N, T]
    """``r + r A`` with ``A = mean over heads of max(0, P * dP)``, ``P = softmax(q kT)``, ``dP = dO vT``."""
    queries = relevance[:, None, : q.shape[2]]  # [N, 1, Tq]
    q, k, v, grad_out = (x.to(relevance.dtype) for x in (q, k, v, grad_out))
    weights = attention_weights(q, k, v, grad_out, scale)
    return relevance + (queries @ weights).squeeze(1)


def attention_weights(
    q: Tensor,  # [N, H, Tq, d]
    k: Tensor,  # [N, H, T, d]
    v: Tensor,  # [N, H, T, d]
    grad_out: Tensor,  # [N, H, Tq, d]
    scale: float,
) -> Tensor:  # [N, Tq, T]
    """``A`` of `attention_relevance`."""
    attention = torch.softmax(q @ k.mT * scale, dim=-1)  # [N, H, Tq, T]
    grad_attention = grad_out @ v.mT  # [N, H, Tq, T]
    return (attention * grad_attention).clamp(min=0).mean(dim=1)
