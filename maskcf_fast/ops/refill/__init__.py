"""Counterfactual images: masked patches take the pixels of other images in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_batch, check_divisible, check_donors, check_tensor, resolve_grid
from ..dispatch import define, implementation
from ..select import check_cam, check_selection, widened
from . import reference

define(reference.refill_patches)
define(reference.counterfactual_refill)

PIXELS = (*FLOATS, torch.uint8)


def refill_patches(
    images: Tensor,
    mask: Tensor,
    donors: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Replace the masked patches of each image by the same patches of a donor image. Copies are bit-exact.

    Not differentiable: the result is cut off from the graph, as pixels are (`gather_tokens` has a gradient).

    Source: Xiao et al., CVPR 2023 (single-fill: one donor per image; multi-fill: one donor per patch).

    Args:
        images: ``[N, C, H, W]``, uint8 or any float dtype, contiguous or channels-last.
        mask: ``[N, L]`` bool, True where the patch is replaced; patches count row by row.
        donors: int64 ``[N]`` (single-fill) or ``[N, L]`` (multi-fill), indices into the batch.
        grid: ``(rows, columns)`` of the patch grid; square when omitted.
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        A new tensor like ``images``, in the same memory format.

    Raises:
        TypeError: An argument is no tensor or has the wrong dtype.
        ValueError: Wrong shapes or devices, an empty batch, a donor outside the batch (read on the CPU, and
            on a GPU under ``MASKCF_DEBUG=1``), or images that do not divide into the grid.
    """
    check_images(images)
    check_tensor("mask", mask, [images.shape[0], "L"], dtypes=[torch.bool], device=images.device)
    check_batch("mask", mask)
    grid = resolve_grid(mask.shape[1], grid)
    check_divisible(images.shape[2], images.shape[3], grid)
    check_donors(donors, images.shape[0], mask.shape[1], images.device)
    run = implementation(reference.refill_patches, impl, images.device, dtype=images.dtype)
    return run(images.detach(), mask, donors, *grid)


def counterfactual_refill(
    images: Tensor,
    cam: Tensor,
    donors: Tensor,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    region: str = "object",
    grid: tuple[int, int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Select patches from the relevance map and refill them, as one op.

    Equal to ``mask = select_patches(cam, ...)`` followed by ``refill_patches(images, mask, donors)``; see
    there for the arguments, the outcome for non-finite maps, and the errors.

    Returns:
        The refilled images, like ``images``, and the mask ``[N, L]`` bool.
    """
    check_images(images)
    check_tensor("cam", cam, [images.shape[0], "L"], dtypes=FLOATS, device=images.device)
    check_cam(cam)
    selection = check_selection(cam.shape[1], threshold, top_k, region)
    grid = resolve_grid(cam.shape[1], grid)
    check_divisible(images.shape[2], images.shape[3], grid)
    check_donors(donors, images.shape[0], cam.shape[1], images.device)
    run = implementation(reference.counterfactual_refill, impl, images.device, dtype=images.dtype)
    return run(images.detach(), widened(cam), donors, *selection, *grid)


def check_images(images: Tensor) -> None:
    """Raise unless ``images`` is a non-empty ``[N, C, H, W]`` of a pixel dtype."""
    check_tensor("images", images, ["N", "C", "H", "W"], dtypes=PIXELS)
    check_batch("images", images)
