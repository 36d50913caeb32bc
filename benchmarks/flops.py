"""Counting products: what `torch.utils.flop_counter` does not know, and F, the unit."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from maskcf_fast.models import VisionTransformerConfig
from maskcf_fast.ops import extension


def complete_flop_counter() -> None:
    """Tell the FLOP counter about what it does not know: the compiled relevance op, and fused attention on a CPU."""
    aten = torch.ops.aten
    if extension.loading_error() is None and torch.ops.maskcf.attention_relevance not in flop_registry:

        @register_flop_formula(torch.ops.maskcf.attention_relevance)
        def relevance(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
            n, heads, queries, width = q
            return 2 * 2 * n * heads * queries * k[2] * width  # two products of [Tq, d] and [d, T] per head

    if aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:

        @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
        def attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
            return sdpa_flop_count(q, k, v)

        @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
        def backward(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
            return sdpa_backward_flop_count(grad, q, k, v)


def forward_flops(config: VisionTransformerConfig, num_tokens: int | None = None) -> int:
    """F: products of one plain forward pass of one image, every token in every block."""
    t, w = num_tokens or 1 + config.num_patches, config.width
    embed = 2 * config.num_patches * w * 3 * config.patch_size**2
    projection = 0 if config.output_dim is None else 2 * w * config.output_dim
    return embed + config.depth * (24 * t * w * w + 4 * t * t * w) + projection
