"""From pixels as the loader delivers them to the rows that a patch embedding multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_batch, check_donors, check_int, check_numbers, check_tensor
from ..dispatch import define, implementation
from . import reference

define(reference.patchify)


def patchify(
    images: Tensor,
    patch_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    donors: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise images and cut them into rows of patches; masked patches may be refilled on the way in.

    With the rows at hand, patch embedding is one matrix product: ``rows @ weight.flatten(1).T`` with the
    convolution's ``weight [D, C, P, P]``.

    Args:
        images: uint8 ``[N, H, W, C]`` (0 to 255, as a loader delivers them), or float ``[N, C, H, W]`` in [0, 1].
        patch_size: Side ``P`` of a patch in pixels.
        mean: Per-channel mean of pixel values in [0, 1].
        std: Per-channel standard deviation, same scale.
        dtype: Float dtype of the result; the arithmetic is float32 (float64 for float64 images).
        mask: ``[N, L]`` bool; masked patches are taken from ``donors``, as in `refill_patches`.
        donors: int64 ``[N]`` or ``[N, L]``; given exactly when ``mask`` is.
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        ``[N, L, C * P * P]`` of ``dtype``, patches row by row, each laid out (C, P, P).

    Raises:
        TypeError: ``images`` is neither uint8 nor float.
        ValueError: Wrong shapes, sizes that do not divide by the patch, a non-positive ``std``, or ``mask``
            without ``donors``.
    """
    if (mask is None) != (donors is None):
        raise ValueError("mask and donors must be given together")
    means, stds = check_numbers("mean", mean), check_numbers("std", std)
    if not means:
        raise ValueError("mean must hold a value per channel, got none")
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        check_tensor("images", images, ["N", "H", "W", len(means)])
        height, width = images.shape[1:3]
    else:
        check_tensor("images", images, ["N", len(means), "H", "W"], dtypes=(*FLOATS, torch.uint8))
        height, width = images.shape[2:]
    check_batch("images", images)
    check_int("patch_size", patch_size, 1)
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}×{width} pixels do not divide by patch_size={patch_size}")
    if len(stds) != len(means) or not all(0 < s < float("inf") for s in stds):
        raise ValueError(f"std must hold {len(means)} positive values, got {tuple(stds)}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    if mask is not None and donors is not None:
        n, num_patches = images.shape[0], height // patch_size * (width // patch_size)
        check_tensor("mask", mask, [n, num_patches], dtypes=[torch.bool], device=images.device)
        check_donors(donors, n, num_patches, images.device)
    run = implementation(reference.patchify, impl, images.device, dtype=images.dtype)
    return run(images.detach(), patch_size, means, stds, dtype, mask, donors)
