"""What a vision transformer consists of: attention, and blocks of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.precision import no_autocast
from ..ops.bias_gelu import bias_gelu
from ..ops.drop import Packing
from ..ops.residual_norm import residual_norm
from .config import QkvBias, VisionTransformerConfig
from .positions import Rotation, rotate


class Tap(NamedTuple):
    """What one layer's attention consumed and produced; ``Tq`` is T, or 1 where one token alone asks."""

    q: Tensor  # [N, H, Tq, d]
    k: Tensor  # [N, H, T, d]
    v: Tensor  # [N, H, T, d]
    o: Tensor  # [N, H, Tq, d], before the output projection
    x: Tensor  # [N, T, D], the layer's normalised input


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Fused attention."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and type(q) is Tensor:  # a fake one is not computed
        # There, forward and backward passes in float32 take 0.45 (50 tokens) to 0.88 (257 tokens) of the time.
        with no_autocast(q.device):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class PackedLinear(nn.Linear):
    """Projections side by side, ``[3 D, D]``, with a bias of all of them, of the first and the last, or of none."""

    def __init__(self, width: int, bias: QkvBias) -> None:
        super().__init__(width, 3 * width, bias=bias != "none")
        if bias == "qv":
            self.bias = nn.Parameter(torch.zeros(2 * width))

    def whole_bias(self) -> Tensor | None:
        """The bias ``[3 D]``, with zeros for the keys' where that is left out."""
        bias, width = self.bias, self.in_features
        if bias is None or len(bias) == 3 * width:
            return bias
        return torch.cat([bias[:width], torch.zeros_like(bias[:width]), bias[width:]])

    def forward(self, x: Tensor) -> Tensor:
        """``[…, D]`` → ``[…, 3 D]``."""
        return F.linear(x, self.weight, self.whole_bias())


class Attention(nn.Module):
    """Attention with packed query, key and value projections."""

    def __init__(self, config: VisionTransformerConfig, heads: int, qkv_bias: QkvBias = "qkv") -> None:
        super().__init__()
        width, eps = config.width, config.eps
        self.heads = heads
        self.qkv = PackedLinear(width, qkv_bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // heads, eps) if config.qk_norm else None for _ in range(2))
        self.norm = nn.LayerNorm(width, eps) if config.attention_norm else None
        self.out = nn.Linear(width, width)
        self.pointwise = POINTWISE

    def forward(
        self, x: Tensor, asking: Tensor | None, packing: Packing | None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tap]:
        """``x [N, T, D]`` → ``[N, T, D]`` and the tap; packed, ``[M, D]`` → ``[M, D]``.

        With ``asking [N, 1, D]``, that alone asks and all of ``x`` answers: ``[N, 1, D]``. It is a token before the
        patches, or none, which is turned by nothing.
        """
        norm, _, _, _, rotate = self.pointwise
        pad = (lambda t: t) if packing is None else packing.pad
        if asking is not None:
            width, bias = x.shape[-1], self.qkv.whole_bias()
            q = F.linear(asking, self.qkv.weight[:width], None if bias is None else bias[:width])
            kv = F.linear(x, self.qkv.weight[width:], None if bias is None else bias[width:])
            k, v = pad(kv).chunk(2, dim=-1)
        else:
            q, k, v = pad(self.qkv(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q = norm(q, self.q_norm.weight, self.q_norm.bias, self.q_norm.eps)
            k = norm(k, self.k_norm.weight, self.k_norm.bias, self.k_norm.eps)
        if rotation is not None:
            q = q if asking is not None else rotate(q, *rotation)
            k = rotate(k, *rotation)
        o = attend(q, k, v, None if packing is None else packing.visible[:, None, None, :])
        joined = o.transpose(1, 2).flatten(2)
        joined = joined if packing is None or asking is not None else packing.pack(joined)
        if self.norm is not None:
            joined = norm(joined, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.out(joined), Tap(q, k, v, o, x)


def class_tokens(x: Tensor, packing: Packing | None) -> Tensor:
    """``[N, 1, D]`` of a batch's tokens: each image's first."""
    return x[:, :1] if packing is None else x.index_select(0, packing.rows[:, 0])[:, None]


# What lies between the matrix products. Compiled (`VisionTransformer.compile_pointwise`), each is one kernel; a
# LayerNorm takes its statistics in float32 and gives the dtype that came in.


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)


def activate(hidden: Tensor, activation: str, gated: bool = False) -> Tensor:
    """GELU, an approximation of it (OpenAI's quick one, or the one by tanh), or SiLU; of the gates, times the rest."""
    if gated:
        gate, value = hidden.chunk(2, dim=-1)
        return activate(gate, activation) * value
    if activation == "silu":
        return F.silu(hidden)
    if activation == "quick_gelu":
        return F.silu(1.702 * hidden) / 1.702  # x σ(1.702 x); its backward pass keeps one tensor, not two
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


POINTWISE: tuple[Callable[..., Any], ...] = (norm, residual_norm, bias_gelu, activate, rotate)


def scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """A residual branch, times its scale if it has one."""
    return branch if scale is None else branch * scale.to(branch.dtype)


class View(NamedTuple):
    """Where a tensor lies in a storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def remade(x: Tensor, make: Callable[..., Tensor], *given: Tensor) -> AbstractContextManager[None]:
    """Within, an operation that would keep ``x``, or a part of it, for its backward pass has it made again there.

    Of what it is made of there may be no other values by then: as autograd does of what it keeps, this raises.
    """
    place, dtype, sources = x.untyped_storage()._cdata, x.dtype, [t.detach() for t in given]
    versions = [t._version for t in sources]

    def pack(kept: Tensor) -> Tensor | View:
        inside = kept.untyped_storage()._cdata == place and kept.dtype == dtype
        return View(kept.shape, kept.stride(), int(kept.storage_offset())) if inside else kept

    def unpack(packed: Tensor | View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if [t._version for t in sources] != versions:
            raise RuntimeError(
                "what a result is made again of for the backward pass has been modified by an inplace operation since "
                "the forward pass"
            )
        with torch.no_grad():
            return make(*sources).as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class WithMlp(nn.Module):
    """A module with two layers that act on each token alone, an activation or gates between them."""

    def __init__(
        self, config: VisionTransformerConfig, hidden: int, *, gated: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, hidden * (2 if gated else 1))
        self.mlp_norm = nn.LayerNorm(hidden, config.eps) if norm else None
        self.proj = nn.Linear(hidden, config.width)
        self.activation, self.gated = config.activation, gated
        self.remake = False  # the activation's result, in the backward pass, instead of keeping it
        self.pointwise = POINTWISE

    def mlp(self, x: Tensor) -> Tensor:
        """``[…, D]`` → ``[…, D]``."""
        norm, _, bias_gelu, activate, _ = self.pointwise
        if self.gated or self.activation == "silu":
            x = activate(self.fc(x), self.activation, self.gated)
        else:
            hidden = F.linear(x, self.fc.weight)
            x = bias_gelu(hidden, self.fc.bias, self.activation)
            if self.remake and self.mlp_norm is None and x.requires_grad:
                with remade(x, partial(bias_gelu, activation=self.activation), hidden, self.fc.bias):
                    return self.proj(x)
        if self.mlp_norm is not None:
            x = norm(x, self.mlp_norm.weight, self.mlp_norm.bias, self.mlp_norm.eps)
        return self.proj(x)


class Block(WithMlp):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        width = config.width
        super().__init__(config, config.mlp_width or 4 * width, gated=config.gated_mlp, norm=config.mlp_norm)
        self.ln_1 = nn.LayerNorm(width, config.eps)
        self.attn = Attention(config, config.heads, config.qkv_bias)
        self.ln_2 = nn.LayerNorm(width, config.eps)
        self.scale_1, self.scale_2 = (
            nn.Parameter(torch.full((width,), 0.1)) if config.layer_scale else None for _ in range(2)
        )

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        cls_only: bool = False,
        packing: Packing | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor, Tap]:
        """``x [N, T, D]``, and the block before's last branch, which is still to be added to it.

        Returns:
            ``[N, Tq, D]`` (the class token alone if ``cls_only``; packed, ``[M, D]``), its last branch, and the tap.
        """
        _, residual_norm, *_ = self.pointwise
        first, second = self.ln_1, self.ln_2
        branch = None if branch is None else branch.to(x.dtype)
        x, normed = residual_norm(x, branch, first.weight, first.bias, first.eps)
        attended, tap = self.attn(normed, class_tokens(normed, packing) if cls_only else None, packing, rotation)
        attended = scaled(attended, self.scale_1)
        x = class_tokens(x, packing) if cls_only else x
        x, normed = residual_norm(x, attended.to(x.dtype), second.weight, second.bias, second.eps)
        return x, scaled(self.mlp(normed), self.scale_2), tap
