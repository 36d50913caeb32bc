"""Counting products: what `torch.utils.flop_counter` does not know, and F, the unit."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from maskcf_fast.models import VisionTransformerConfig


def complete_flop_counter() -> None:
    """Tell the FLOP counter about what it does not know: the relevance kernels, and fused attention on a CPU."""
    aten = torch.ops.aten
    formulas: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
        torch.ops.maskcf.attention_relevance: relevance_flops,
        torch.ops.maskcf_triton.attention_relevance: relevance_flops,
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


def relevance_flops(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    """Two products of ``[Tq, d]`` and ``[d, T]`` per head; that a kernel forms one of them twice is its own affair."""
    n, heads, queries, width = q
    return 2 * 2 * n * heads * queries * k[2] * width


def forward_flops(config: VisionTransformerConfig) -> int:
    """F: products of one plain forward pass of one image, every token in every block."""
    t, w = 1 + config.num_patches, config.width
    embed = 2 * config.num_patches * w * 3 * config.patch_size**2
    projection = 0 if config.output_dim is None else 2 * w * config.output_dim
    return embed + config.depth * (24 * t * w * w + 4 * t * t * w) + projection
