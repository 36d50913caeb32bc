"""Pooling: how a feature is read from tokens, where it is not the class token's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.drop import Packing
from .blocks import Attention, Tap, WithMlp
from .config import VisionTransformerConfig


class PoolTap(Tap):
    """The tap of an attention pool: its one query is no token, ``k``, ``v`` and ``x`` are all tokens."""

    __slots__ = ()


class AttentionPool(WithMlp):
    """Tokens → feature: a learned probe asks, and all tokens answer.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, as in big_vision.
    """

    def __init__(self, config: VisionTransformerConfig) -> None:
        width = config.width
        super().__init__(config, config.pool_mlp_width or config.mlp_width or 4 * width)
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attn = Attention(config, config.pool_heads or config.heads)
        self.ln = nn.LayerNorm(width, config.eps)

    def forward(self, tokens: Tensor, packing: Packing | None, lost: Tensor | None) -> tuple[Tensor, PoolTap]:
        """Read the feature.

        Where an image has no token left, nothing answers: attention's output is then zero, and the feature the same
        for all such images.

        Args:
            tokens: ``[N, T, D]`` after the last LayerNorm; with ``packing``, ``[M, D]``.
            packing: Where they belong.
            lost: bool ``[N]``, images without a token, where there can be any.

        Returns:
            ``[N, D]``, and the tap.
        """
        norm = self.pointwise[0]
        n = tokens.shape[0] if packing is None else packing.rows.shape[0]
        x, tap = self.attn(tokens, self.probe.to(tokens.dtype).expand(n, 1, -1), packing)
        if lost is not None:
            x = torch.where(lost[:, None, None], self.attn.out.bias.to(x.dtype), x)
        x = x + self.mlp(norm(x, self.ln.weight, self.ln.bias, self.ln.eps))
        return x[:, 0], PoolTap(*tap)


def mean_pool(tokens: Tensor, prefix: int, packing: Packing | None, lost: Tensor | None) -> Tensor:
    """The mean of each image's patches, ``[N, D]``; of none, zero.

    Args:
        tokens: ``[N, T, D]``, patches behind ``prefix`` others; with ``packing``, ``[M, D]``.
        prefix: Tokens that do not count.
        packing: Where they belong.
        lost: As `AttentionPool` takes it.
    """
    if packing is None:
        return tokens[:, prefix:].sum(dim=1) / max(tokens.shape[1] - prefix, 1)
    patches = packing.pad(tokens)[:, prefix:]
    counted = packing.visible[:, prefix:] if lost is None else packing.visible & ~lost[:, None]
    return torch.where(counted[..., None], patches, 0).sum(dim=1) / counted.sum(dim=1, keepdim=True).clamp(min=1)
