"""Pixels to rows of normalised patches in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    patch_size: int,
    mean: Tensor,  # [C] float32
    std: Tensor,  # [C] float32
    dtype: torch.dtype,
) -> Tensor:  # [N, L, C * P * P]
    """``(pixel - mean) / std``, cut into patches; a row has the layout of a convolution weight (C, P, P)."""
    n, c, h, w = images.shape
    p = patch_size
    images = (images - mean[:, None, None]) / std[:, None, None]
    patches = images.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, (h // p) * (w // p), c * p * p).to(dtype)
