"""Patch selection in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def usable_rows(
    cam: Tensor,  # [N, L] float
) -> Tensor:  # [N, L] float, non-finite rows replaced by zeros
    """A row with a NaN or an infinity says nothing about its patches: it counts as all zeros."""
    return torch.where(cam.isfinite().all(dim=1, keepdim=True), cam, torch.zeros_like(cam))


def select_patches(
    cam: Tensor,  # [N, L] float32 or float64
    threshold: float | None,
    top_k: int | None,
    context: bool,
) -> Tensor:  # [N, L] bool
    """By ``threshold``, ``cam / (row maximum + 1e-8) > threshold`` (context: the complement).

    By ``top_k``, the highest (context: the lowest) patches; ties go to the lower patch index.
    """
    cam = usable_rows(cam)
    if threshold is not None:
        selected = cam / (cam.amax(dim=1, keepdim=True) + 1e-8) > threshold
        return ~selected if context else selected
    chosen = torch.argsort(cam, dim=1, descending=not context, stable=True)[:, :top_k]
    mask = torch.zeros(cam.shape, dtype=torch.bool, device=cam.device)
    return mask.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
