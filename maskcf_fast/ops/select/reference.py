"""Patch selection in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def usable_rows(
    cam: Tensor,  # [N, L] float
) -> Tensor:  # [N, L] float, non-finite rows replaced by zeros
    """A row with a NaN or an infinity says nothing about its patches: it counts as all zeros."""
    return torch.where(cam.isfinite().all(dim=1, keepdim=True), cam, torch.zeros_like(cam))


def select_by_threshold(
    cam: Tensor,  # [N, L] float
    threshold: float,
    region: str,
) -> Tensor:  # [N, L] bool
    """Object: ``cam / (row maximum + 1e-8) > threshold``; context: its complement."""
    cam = usable_rows(cam)
    score = cam / (cam.amax(dim=1, keepdim=True) + 1e-8)
    selected = score > threshold
    return selected if region == "object" else ~selected


def select_top_k(
    cam: Tensor,  # [N, L] float
    k: int,
    region: str,
) -> Tensor:  # [N, L] bool
    """Object: the ``k`` highest patches; context: the ``k`` lowest; ties go to the lower patch index."""
    cam = usable_rows(cam)
    order = torch.argsort(cam, dim=1, descending=region == "object", stable=True)
    mask = torch.zeros(cam.shape, dtype=torch.bool, device=cam.device)
    return mask.scatter(1, order[:, :k], torch.ones_like(order[:, :k], dtype=torch.bool))
