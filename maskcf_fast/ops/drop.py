"""Leaving masked patches out of a transformer's input (no-fill)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import FLOATS, check_batch, check_tensor, value_checks


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
            padded to the longest, whose length is read from the device; `pack_tokens` spares the padding.

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


class Packing(NamedTuple):
    """Where the tokens of images of different lengths lie, one behind the other, and where in a padded batch.

    Attributes:
        rows: int64 ``[N, T]``, the row of each place of the padded batch; at padding, that of the class token.
        visible: bool ``[N, T]``, False at padding.
        places: int64 ``[M]``, the place of each row in the padded batch, which is flattened to N * T places.
    """

    rows: Tensor
    visible: Tensor
    places: Tensor

    def pad(self, packed: Tensor) -> Tensor:
        """``[M, D]`` as a padded batch ``[N, T, D]``."""
        return packed.index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """``[N, T, D]`` without its padding, ``[M, D]``."""
        return padded.flatten(0, 1).index_select(0, self.places)


def pack_tokens(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Packing]:
    """Keep the class token and the patches that are not masked, as rows without padding.

    For masks that leave out different numbers of patches. All that a transformer computes for each token by itself then
    costs what the kept tokens cost; only attention needs the padded batch. Differentiable in ``tokens``; two numbers
    are read from the device.

    Args:
        tokens: ``[N, 1 + L, D]``, any float dtype, class token first.
        mask: ``[N, L]`` bool, True where the patch is left out.

    Returns:
        The kept tokens ``[M, D]``, image after image in their order, and their `Packing`.

    Raises:
        TypeError: Wrong dtypes.
        ValueError: Wrong shapes.
    """
    check_tensor("tokens", tokens, ["N", "1 + L", "D"], dtypes=FLOATS)
    check_batch("tokens", tokens)
    n, length = tokens.shape[0], tokens.shape[1]
    device = tokens.device
    check_tensor("mask", mask, [n, length - 1], dtypes=[torch.bool], device=device)
    left_out = torch.cat([mask.new_zeros(n, 1), mask], dim=1)
    lengths = length - left_out.sum(dim=1)
    longest, total = torch.stack([lengths.max(), lengths.sum()]).tolist()
    first = lengths.cumsum(0) - lengths  # row of each image's class token
    place = torch.arange(longest, device=device)
    visible = place < lengths[:, None]
    rows = torch.where(visible, first[:, None] + place, first[:, None])
    image = torch.repeat_interleave(torch.arange(n, device=device), lengths, output_size=total)
    places = image * longest + torch.arange(total, device=device) - first[image]
    kept = torch.argsort(left_out.flatten(), stable=True)[:total]
    return tokens.flatten(0, 1).index_select(0, kept), Packing(rows, visible, places)
