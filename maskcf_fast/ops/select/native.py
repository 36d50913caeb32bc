"""Patch selection by the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

OPS = extension.ops()


@torch.library.register_fake("maskcf::select_by_threshold")
@torch.library.register_fake("maskcf::select_top_k")
def _fake(cam: Tensor, cut: float, context: bool) -> Tensor:
    return cam.new_empty(cam.shape, dtype=torch.bool)


def select_by_threshold(
    cam: Tensor,  # [N, L] float32 or float64
    threshold: float,
    region: str,
) -> Tensor:  # [N, L] bool
    """Object: ``cam / (row maximum + 1e-8) > threshold``; context: its complement."""
    return OPS.select_by_threshold(cam.detach().contiguous(), threshold, region == "context")


def select_top_k(
    cam: Tensor,  # [N, L] float32 or float64
    k: int,
    region: str,
) -> Tensor:  # [N, L] bool
    """Object: the ``k`` highest patches; context: the ``k`` lowest; ties go to the lower patch index."""
    return OPS.select_top_k(cam.detach().contiguous(), k, region == "context")
