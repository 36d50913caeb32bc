"""Refill in token space: the masked tokens of an image become those of its donors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_batch, check_donors, check_tensor
from ..dispatch import implementation


def gather_tokens(tokens: Tensor, mask: Tensor, donors: Tensor, *, impl: str = "auto") -> Tensor:
    """Refill embedded patches instead of pixels.

    Patch embedding, position embedding and a LayerNorm act on each patch alone, and a donor patch keeps its
    position; so for a vision transformer, gathering embedded tokens equals refilling the pixels and embedding
    the result, without the second embedding. Differentiable in ``tokens``.

    Args:
        tokens: ``[N, 1 + L, D]``, any float dtype; token 0 is the class token and stays.
        mask: ``[N, L]`` bool, True where the token is replaced.
        donors: int64 ``[N]`` (single-fill) or ``[N, L]`` (multi-fill), indices into the batch.
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        A new tensor like ``tokens``. Copies are bit-exact.

    Raises:
        TypeError: An argument is no tensor or has the wrong dtype.
        ValueError: Wrong shapes or devices, an empty batch, or a donor outside the batch (read on the CPU,
            and on a GPU under ``MASKCF_DEBUG=1``).
    """
    check_tensor("tokens", tokens, ["N", "1 + L", "D"], dtypes=FLOATS)
    check_batch("tokens", tokens)
    n, num_patches = tokens.shape[0], tokens.shape[1] - 1
    check_tensor("mask", mask, [n, num_patches], dtypes=[torch.bool], device=tokens.device)
    check_batch("mask", mask)
    check_donors(donors, n, num_patches, tokens.device)
    return implementation(__name__, impl, tokens.device, dtype=tokens.dtype).gather_tokens(tokens, mask, donors)
