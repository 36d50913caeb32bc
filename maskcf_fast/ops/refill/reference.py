"""Pixel refill in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..select import reference as select


def refill_patches(
    images: Tensor,  # [N, C, H, W] any dtype
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    rows: int,
    cols: int,
) -> Tensor:  # like images, same memory format
    """Every masked patch takes the pixels of the same position in its donor image."""
    n, c, h, w = images.shape
    own = torch.arange(n, device=images.device)[:, None]
    source = torch.where(mask, donors if donors.ndim == 2 else donors[:, None], own)  # [N, L]
    patches = images.reshape(n, c, rows, h // rows, cols, w // cols)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [N, L, C, h, w]
    position = torch.arange(rows * cols, device=images.device)
    refilled = patches[source, position]  # [N, L, C, h, w]
    refilled = refilled.unflatten(1, (rows, cols)).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return refilled.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def counterfactual_refill(
    images: Tensor,  # [N, C, H, W] any dtype
    cam: Tensor,  # [N, L] float32 or float64
    donors: Tensor,  # [N] or [N, L] int64
    threshold: float | None,
    top_k: int | None,
    context: bool,
    rows: int,
    cols: int,
) -> tuple[Tensor, Tensor]:  # like images, and the mask [N, L] bool
    """Selection, then refill."""
    mask = select.select_patches(cam, threshold, top_k, context)
    return refill_patches(images, mask, donors, rows, cols), mask
