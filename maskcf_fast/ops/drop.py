"""Leaving masked patches out of a transformer's input (no-fill)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import FLOATS, check_batch, check_tensor, value_checks


def drop_tokens(tokens: Tensor, mask: Tensor, *, dropped: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Keep the class token and the patches that are not masked, as a smaller dense batch.

    Hiding a patch as an attention key in every layer and dropping its token give the same class-token
    feature: the class token is all that is read out, and a hidden key influences nothing. Differentiable in
    ``tokens``.

    Args:
        tokens: ``[N, 1 + L, D]``, any float dtype, class token first.
        mask: ``[N, L]`` bool, True where the patch is left out.
        dropped: Number of masked patches when it is the same in every image (top-k, random): the result then
            needs no key mask, and nothing waits for the GPU. None when it differs (threshold): images are
            padded to the longest, whose length is read from the device.

    Returns:
        The kept tokens ``[N, 1 + K, D]`` in their order, and a key mask ``[N, 1 + K]`` bool, True where a key
        may be attended to, or None when all may.

    Raises:
        TypeError: Wrong dtypes.
        ValueError: Wrong shapes, or ``dropped`` outside 0 to L.
    """
    check_tensor("tokens", tokens, ["N", "1 + L", "D"], dtypes=FLOATS)
    check_batch("tokens", tokens)
    n, num_patches = tokens.shape[0], tokens.shape[1] - 1
    check_tensor("mask", mask, [n, num_patches], dtypes=[torch.bool], device=tokens.device)
    if dropped is not None and not 0 <= dropped <= num_patches:
        raise ValueError(f"dropped must lie between 0 and L={num_patches}, got {dropped}")
    if dropped is not None and value_checks(mask) and not (mask.sum(dim=1) == dropped).all():
        raise ValueError(f"dropped={dropped}, but the mask leaves out {mask.sum(dim=1).tolist()[:8]} patches")
    kept = ~mask
    longest = num_patches - dropped if dropped is not None else int(kept.sum(dim=1).max())
    order = torch.argsort(mask, dim=1, stable=True)[:, :longest]  # the kept patches, then padding
    cls_token = torch.zeros(n, 1, dtype=order.dtype, device=order.device)
    source = torch.cat([cls_token, order + 1], dim=1)  # [N, 1 + K]
    rows = torch.arange(n, device=tokens.device)[:, None] * tokens.shape[1] + source
    packed = tokens.flatten(0, 1).index_select(0, rows.flatten()).view(n, 1 + longest, -1)
    if dropped is not None:
        return packed, None
    visible = torch.cat([torch.ones_like(cls_token, dtype=torch.bool), kept.gather(1, order)], dim=1)
    return packed, visible
