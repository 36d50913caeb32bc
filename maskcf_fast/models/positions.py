"""Where patches lie: learned position embeddings, at other image sizes than those that they were learned at."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError


def resample_positions(positions: Tensor, prefix: int, side: int, antialias: bool) -> Tensor:
    """Position embeddings for another grid, by bicubic interpolation in float32.

    Args:
        positions: ``[prefix + L, D]`` float, patches row by row in a square grid.
        prefix: Tokens before the patches that have a position; those stay as they are.
        side: Rows and columns of the grid that is wanted.
        antialias: Whether a smaller grid is smoothed: timm and open_clip do so, most of Hugging Face's models do not.

    Returns:
        ``[prefix + side * side, D]`` in the dtype of ``positions``.

    Raises:
        ValueError: The patches' positions form no square grid.
    """
    patches = positions[prefix:]
    old = math.isqrt(len(patches))
    if not old or old * old != len(patches):
        raise UserError(
            f"the weights have {len(positions)} positions: without the {prefix} of tokens before the patches they form "
            "no square grid that could be resampled; take weights that were trained on square images"
        )
    grid = patches.float().unflatten(0, (1, old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:prefix], grid[0].flatten(1).mT.to(positions.dtype)])
