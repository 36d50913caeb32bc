"""Pixels to rows of normalised patches in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..refill import reference as refill


def patchify(
    images: Tensor,  # [N, H, W, C] uint8, or [N, C, H, W] float in [0, 1]
    patch_size: int,
    mean: list[float],  # C values
    std: list[float],  # C values
    dtype: torch.dtype,
    mask: Tensor | None,  # [N, L] bool
    donors: Tensor | None,  # [N] or [N, L] int64
) -> Tensor:  # [N, L, C * P * P]
    """``(pixel - mean) / std``, cut into patches; a row has the layout of a convolution weight (C, P, P)."""
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).float() / 255
    elif images.dtype != torch.float64:
        images = images.float()
    n, c, h, w = images.shape
    p = patch_size
    if mask is not None and donors is not None:
        images = refill.refill_patches(images, mask, donors, h // p, w // p)
    images = (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
    patches = images.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, (h // p) * (w // p), c * p * p).to(dtype)
