"""Pixel refill by the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

OPS = extension.ops()


@torch.library.register_fake("maskcf::refill_patches")
def _fake_refill(images: Tensor, mask: Tensor, donors: Tensor, rows: int, cols: int) -> Tensor:
    return torch.empty_like(images)


@torch.library.register_fake("maskcf::counterfactual_refill")
def _fake_counterfactual(
    images: Tensor,
    cam: Tensor,
    donors: Tensor,
    threshold: float | None,
    top_k: int,
    context: bool,
    rows: int,
    cols: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(images), cam.new_empty(cam.shape, dtype=torch.bool)


def dense(images: Tensor) -> Tensor:
    """The images themselves if contiguous or channels-last, else a contiguous copy."""
    if images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last):
        return images.detach()
    return images.detach().contiguous()


def refill_patches(
    images: Tensor,  # [N, C, H, W] any dtype
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    grid: tuple[int, int],
) -> Tensor:  # like images, same memory format
    """Every masked patch takes the pixels of the same position in its donor image."""
    return OPS.refill_patches(dense(images), mask.contiguous(), donors.contiguous(), *grid)


def counterfactual_refill(
    images: Tensor,  # [N, C, H, W] any dtype
    cam: Tensor,  # [N, L] float32 or float64
    donors: Tensor,  # [N] or [N, L] int64
    threshold: float | None,
    top_k: int | None,
    region: str,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # like images, and the mask [N, L] bool
    """Selection and refill in one pass."""
    return OPS.counterfactual_refill(
        dense(images), cam.detach().contiguous(), donors.contiguous(), threshold, top_k or 0, region == "context", *grid
    )
