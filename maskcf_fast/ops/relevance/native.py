"""Attention relevance by the compiled extension: no attention map is ever in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

OPS = extension.ops()
MAX_WIDTH = 128  # of a head, on CUDA


@torch.library.register_fake("maskcf::attention_relevance")
def _fake(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, relevance: Tensor, scale: float) -> Tensor:
    return torch.empty_like(relevance)


def lacks(device: str, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot take heads of this dtype and width; None if they can."""
    if device == "cuda" and dtype == torch.float64:
        return "no kernel for float64"
    if device == "cuda" and width > MAX_WIDTH:
        return f"heads are at most {MAX_WIDTH} wide, got d={width}"
    return None


def attention_relevance(
    q: Tensor,  # [N, H, Tq, d], Tq = T or 1; one float dtype for q, k, v and grad_out
    k: Tensor,  # [N, H, T, d]
    v: Tensor,  # [N, H, T, d]
    grad_out: Tensor,  # [N, H, Tq, d]
    relevance: Tensor,  # [N, T] float32, or float64 with float64
    scale: float,
) -> Tensor:  # [N, T]
    """``r + r A`` with ``A = mean over heads of max(0, P * dP)``, ``P = softmax(q kT)``, ``dP = dO vT``."""
    # Any layout will do as long as a token's head is contiguous, which a view of a packed projection is.
    q, k, v, grad_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad_out))
    return OPS.attention_relevance(q, k, v, grad_out, relevance.contiguous(), scale)
