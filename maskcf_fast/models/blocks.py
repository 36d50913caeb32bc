"""What a vision transformer consists of: attention, and blocks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.precision import no_autocast
from ..ops.drop import Packing
from .config import VisionTransformerConfig


class Tap(NamedTuple):
    """What one layer's attention consumed and produced; ``Tq`` is T, or 1 where one token alone asks."""

    q: Tensor  # [N, H, Tq, d]
    k: Tensor  # [N, H, T, d]
    v: Tensor  # [N, H, T, d]
    o: Tensor  # [N, H, Tq, d], before the output projection
    x: Tensor  # [N, T, D], the layer's normalised input


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Fused attention."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # There, forward and backward passes in float32 take 0.45 (50 tokens) to 0.88 (257 tokens) of the time.
        with no_autocast(q.device):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Attention with packed query, key and value projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, asking: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tap]:
        """``x [N, T, D]`` → ``[N, T, D]`` and the tap; packed, ``[M, D]`` → ``[M, D]``.

        With ``asking [N, 1, D]``, that alone asks and all of ``x`` answers: ``[N, 1, D]``.
        """
        pad = (lambda t: t) if packing is None else packing.pad
        if asking is not None:
            width = x.shape[-1]
            q = F.linear(asking, self.qkv.weight[:width], self.qkv.bias[:width])
            k, v = pad(F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])).chunk(2, dim=-1)
        else:
            q, k, v = pad(self.qkv(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        o = attend(q, k, v, None if packing is None else packing.visible[:, None, None, :])
        joined = o.transpose(1, 2).flatten(2)
        return self.out(joined if packing is None or asking is not None else packing.pack(joined)), Tap(q, k, v, o, x)


def class_tokens(x: Tensor, packing: Packing | None) -> Tensor:
    """``[N, 1, D]`` of a batch's tokens: each image's first."""
    return x[:, :1] if packing is None else x.index_select(0, packing.rows[:, 0])[:, None]


# What lies between the matrix products. Compiled (`VisionTransformer.compile_pointwise`), each is one kernel; a
# LayerNorm takes its statistics in float32 and gives the dtype that came in.


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + y``, and its LayerNorm."""
    x = x + y
    return x, norm(x, weight, bias, eps)


def activate(hidden: Tensor, activation: str) -> Tensor:
    """GELU, or an approximation of it: OpenAI's quick one, or the one by tanh."""
    if activation == "quick_gelu":
        return F.silu(1.702 * hidden) / 1.702  # x σ(1.702 x); its backward pass keeps one tensor, not two
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


POINTWISE: tuple[Callable[..., Any], ...] = (norm, add_norm, activate)


def scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """A residual branch, times its scale if it has one."""
    return branch if scale is None else branch * scale.to(branch.dtype)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width or 4 * config.width
        self.ln_1 = nn.LayerNorm(width, config.eps)
        self.attn = Attention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width, config.eps)
        self.fc = nn.Linear(width, hidden)
        self.proj = nn.Linear(hidden, width)
        self.scale_1, self.scale_2 = (
            nn.Parameter(torch.full((width,), 0.1)) if config.layer_scale else None for _ in range(2)
        )
        self.activation = config.activation
        self.pointwise = POINTWISE

    def forward(self, x: Tensor, cls_only: bool = False, packing: Packing | None = None) -> tuple[Tensor, Tap]:
        """``x [N, T, D]`` → ``[N, Tq, D]`` (the class token alone if ``cls_only``) and the tap; packed, as there."""
        norm, add_norm, activate = self.pointwise
        first, second = self.ln_1, self.ln_2
        normed = norm(x, first.weight, first.bias, first.eps)
        attended, tap = self.attn(normed, class_tokens(normed, packing) if cls_only else None, packing)
        attended = scaled(attended, self.scale_1)
        x = class_tokens(x, packing) if cls_only else x
        x, normed = add_norm(x, attended, second.weight, second.bias, second.eps)
        return x + scaled(self.proj(activate(self.fc(normed), self.activation)), self.scale_2), tap
