"""Where patches lie: learned position embeddings, at other image sizes than theirs, and rotary ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError
from .config import VisionTransformerConfig


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


def rotary_angles(config: VisionTransformerConfig, device: torch.device) -> Tensor | None:
    """By how much a token's queries and keys are turned, ``[T, d / 2]`` float32; before the patches, by nothing.

    None for models without rotary positions. It depends on where a patch lies and on nothing else: a patch that is
    refilled from another image keeps its place, so that refilling tokens is exact with rotary positions, too.
    """
    rotary = config.rotary
    if rotary is None:
        return None
    side, quarter = config.image_size // config.patch_size, config.width // config.heads // 4
    at = torch.arange(side, device=device, dtype=torch.float32)
    if rotary.coordinates == "centred":
        at = 2 * math.pi * (2 * (at + 0.5) / side - 1)
    else:
        at = (at + rotary.offset) * ((rotary.grid or side) / side)
    turns = at[:, None] * rotary.theta ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = turns[:, None].expand(side, side, quarter), turns[None].expand(side, side, quarter)
    axes = (columns, rows) if rotary.columns_first else (rows, columns)
    return F.pad(torch.cat(axes, dim=-1).flatten(0, 1), (0, 0, config.prefix, 0))


class Rotation(NamedTuple):
    """Cosine and sine of `rotary_angles`, ``[T, d / 2]`` or ``[N, 1, T, d / 2]``, and which channels turn together."""

    cos: Tensor
    sin: Tensor
    halves: bool


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """Queries or keys ``[N, H, T, d]``, turned (Su et al., "RoFormer", 2021)."""
    a, b = x.chunk(2, dim=-1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.cat(turned, dim=-1) if halves else torch.stack(turned, dim=-1).flatten(-2)).to(x.dtype)
