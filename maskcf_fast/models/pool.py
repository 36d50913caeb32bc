"""Attention pooling, as in SigLIP: a learned probe asks, all patches answer, and no class token is needed.

Outside the model the probe's row lies where a class token would, before the patches, so that refilling and dropping
patches is the same for both. Inside, no patch sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.drop import Packing
from .blocks import POINTWISE, Attention, Tap
from .config import VisionTransformerConfig


class PoolTap(Tap):
    """The tap of an attention pool: its one query is no token, ``k``, ``v`` and ``x`` are the patches alone."""

    __slots__ = ()


class AttentionPool(nn.Module):
    """Patches → feature (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, as in big_vision)."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width or 4 * config.width
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attn = Attention(width, config.heads)
        self.ln = nn.LayerNorm(width, config.eps)
        self.fc = nn.Linear(width, hidden)
        self.proj = nn.Linear(hidden, width)
        self.activation = config.activation
        self.pointwise = POINTWISE

    def forward(self, patches: Tensor, probe: Tensor, packing: Packing | None) -> tuple[Tensor, PoolTap]:
        """Read the feature.

        Where an image has no patch left, nothing answers: attention's output is then zero, and the feature the same
        for all such images.

        Args:
            patches: ``[N, L, D]`` after the last LayerNorm; with ``packing``, ``[M, D]``.
            probe: ``[N, 1, D]``.
            packing: As `without_probe` makes it.

        Returns:
            ``[N, D]``, and the tap.
        """
        norm, _, activate = self.pointwise
        x, tap = self.attn(patches, probe, packing)
        if packing is not None:  # the probe's row is visible where there is no other
            x = torch.where(packing.visible[:, :1, None], self.attn.out.bias.to(x.dtype), x)
        normed = norm(x, self.ln.weight, self.ln.bias, self.ln.eps)
        x = x + self.proj(activate(self.fc(normed), self.activation))
        return x[:, 0], PoolTap(*tap)


def without_probe(tokens: Tensor, packing: Packing | None) -> tuple[Tensor, Packing | None]:
    """The tokens as the blocks shall see them.

    A dense batch loses the probe's rows. In a packed one they stay, hidden from the patches: nobody reads what becomes
    of them, and moving all other rows would cost more. An image without a patch keeps its probe's row visible, since
    attention to nothing at all is not a number in some kernels.
    """
    if packing is None:
        return tokens[:, 1:], None
    patches = packing.visible[:, 1:]
    empty = ~patches.any(dim=1, keepdim=True)
    return tokens, packing._replace(visible=torch.cat([empty, patches], dim=1))
