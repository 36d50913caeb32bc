"""Leaving masked patches out of a transformer's input (no-fill)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_int, check_tokens, value_checks


def drop_tokens(
    tokens: Tensor, mask: Tensor, *, dropped: int | None = None, prefix: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Keep the prefix and the patches that are not masked, as a smaller dense batch.

    Hiding a patch as an attention key in every layer and dropping its token give the same tokens elsewhere, since a
    hidden key influences nothing: the same feature, if it is read from the class token or from what is kept.
    Differentiable in ``tokens``.

    Args:
        tokens: ``[N, T, D]``, any float dtype, ``T = prefix + L``.
        mask: ``[N, L]`` bool, True where the patch is left out.
        dropped: Number of masked patches when it is the same in every image (top-k, random): the result then
            needs no key mask, and nothing waits for the GPU. None when it differs (threshold): images are
            padded to the longest, whose length is read from the device; `pack_tokens` spares the padding.
        prefix: Tokens before the patches, which stay: class token and registers, 0 if there are none.

    Returns:
        The kept tokens ``[N, prefix + K, D]`` in their order, and a key mask ``[N, prefix + K]`` bool, True where a key
        may be attended to, or None when all may.

    Raises:
        TypeError: Wrong dtypes, or a number that is no int.
        ValueError: Wrong shapes, ``dropped`` outside 0 to L, or a ``prefix`` that leaves no patch.
    """
    n, num_patches = check_tokens(tokens, mask, prefix)
    if dropped is not None:
        check_int("dropped", dropped, 0, num_patches, "L")
    if dropped is not None and value_checks(mask) and not (mask.sum(dim=1) == dropped).all():
        raise ValueError(f"dropped={dropped}, but the mask leaves out {mask.sum(dim=1).tolist()[:8]} patches")
    kept = ~mask
    longest = num_patches - dropped if dropped is not None else int(kept.sum(dim=1).max())
    order = torch.argsort(mask, dim=1, stable=True)[:, :longest]  # the kept patches, then padding
    first = torch.arange(prefix, device=order.device).expand(n, -1)
    source = torch.cat([first, prefix + order], dim=1)  # [N, prefix + K]
    rows = torch.arange(n, device=tokens.device)[:, None] * tokens.shape[1] + source
    packed = tokens.flatten(0, 1).index_select(0, rows.flatten()).view(n, prefix + longest, tokens.shape[2])
    if dropped is not None:
        return packed, None
    visible = torch.cat([torch.ones_like(first, dtype=torch.bool), kept.gather(1, order)], dim=1)
    return packed, visible


class Packing(NamedTuple):
    """Where the tokens of images of different lengths lie, one behind the other, and where in a padded batch.

    Attributes:
        rows: int64 ``[N, T]``, the row of each place of the padded batch; at padding, that of the image's first token,
            or of another image where nothing is left of it.
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


def pack_tokens(tokens: Tensor, mask: Tensor, *, prefix: int = 1) -> tuple[Tensor, Packing]:
    """Keep the prefix and the patches that are not masked, as rows without padding.

    For masks that leave out different numbers of patches. All that a transformer computes for each token by itself then
    costs what the kept tokens cost; only attention needs the padded batch. Differentiable in ``tokens``; two numbers
    are read from the device.

    Args:
        tokens: ``[N, T, D]``, any float dtype, ``T = prefix + L``.
        mask: ``[N, L]`` bool, True where the patch is left out.
        prefix: Tokens before the patches, which stay: class token and registers, 0 if there are none.

    Returns:
        The kept tokens ``[M, D]``, image after image in their order, and their `Packing`.

    Raises:
        TypeError: Wrong dtypes, or a ``prefix`` that is no int.
        ValueError: Wrong shapes, or a ``prefix`` that leaves no patch.
    """
    n, _ = check_tokens(tokens, mask, prefix)
    device = tokens.device
    left_out = torch.cat([mask.new_zeros(n, prefix), mask], dim=1)
    lengths = tokens.shape[1] - left_out.sum(dim=1)
    longest, total = torch.stack([lengths.max(), lengths.sum()]).tolist()
    first = lengths.cumsum(0) - lengths  # row of each image's first token
    place = torch.arange(longest, device=device)
    visible = place < lengths[:, None]
    rows = torch.where(visible, first[:, None] + place, first[:, None].clamp(max=total - 1))
    image = torch.repeat_interleave(torch.arange(n, device=device), lengths, output_size=total)
    places = image * longest + torch.arange(total, device=device) - first[image]
    kept = torch.argsort(left_out.flatten(), stable=True)[:total]
    return tokens.flatten(0, 1).index_select(0, kept), Packing(rows, visible, places)
