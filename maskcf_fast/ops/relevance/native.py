"""Attention relevance by the compiled extension: no attention map is ever in memory."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from .. import extension

OPS = extension.ops()
MAX_WIDTH = 128  # of a head, on CUDA


@torch.library.register_fake("maskcf::attention_relevance")
def _fake(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, relevance: Tensor, scale: float) -> Tensor:
    return torch.empty_like(relevance)


def lacks(impl: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot take heads of this dtype and width; None if they can."""
    if impl == "cpu":
        return None
    if dtype == torch.float64:
        return "no kernel for float64"
    if width > MAX_WIDTH:
        return f"heads are at most {MAX_WIDTH} wide, got d={width}"
    return lacks_shared(shared_limit(device), dtype, width)


def lacks_shared(limit: int, dtype: torch.dtype, width: int) -> str | None:
    """The same, of a GPU on which a block may have ``limit`` bytes of shared memory."""
    row = -(-width // 16) * 16 * dtype.itemsize + 16  # whole steps of the tensor cores, and a gap
    needed = 4 * 64 * row  # four tiles of 64 rows (csrc/relevance.cuh)
    if needed > limit:
        return f"heads of {width} {dtype} take {needed} bytes of shared memory per block, and the GPU has {limit}"
    return None


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a kernel may ask for."""
    if device.type != "cuda":  # an emulated GPU refuses for itself
        return sys.maxsize
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


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
