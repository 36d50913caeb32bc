"""Pixels to rows of normalised patches by the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

OPS = extension.ops()


@torch.library.register_fake("maskcf::patchify")
def _fake(
    images: Tensor,
    patch_size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    mask: Tensor | None,
    donors: Tensor | None,
) -> Tensor:
    channels = len(mean)
    patches = images.numel() // (images.shape[0] * channels * patch_size * patch_size)
    return images.new_empty((images.shape[0], patches, channels * patch_size * patch_size), dtype=dtype)


def patchify(
    images: Tensor,  # [N, H, W, C] uint8, or [N, C, H, W] float in [0, 1]
    patch_size: int,
    mean: tuple[float, ...],  # C values
    std: tuple[float, ...],  # C values
    dtype: torch.dtype,
    mask: Tensor | None,  # [N, L] bool
    donors: Tensor | None,  # [N] or [N, L] int64
) -> Tensor:  # [N, L, C * P * P]
    """``(pixel - mean) / std``, cut into patches; a row has the layout of a convolution weight (C, P, P)."""
    mask = mask if mask is None else mask.contiguous()
    donors = donors if donors is None else donors.contiguous()
    return OPS.patchify(images.detach(), patch_size, mean, std, dtype, mask, donors)
