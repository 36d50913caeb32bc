"""One training step exactly as the paper's method describes it: the contract of the fast step.

Written plainly and on its own: attention maps and T×T relevance products in memory, counterfactual images made
of pixels, separate forward passes, every token computed in every block. It shares only the model's parameters,
the selection of patches and a fill's pixels with the fast step.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import ImageClassifier, VisionTransformer
from ..models.blocks import Block
from .losses import StepOutput
from .strategies import Draw, MaskStrategy


def paper_order_step(
    student: ImageClassifier,
    teacher: VisionTransformer,
    strategy: MaskStrategy,
    images: Tensor,  # [N, 3, S, S] in [0, 1]
    labels: Tensor,  # [N] int64
    draw: Draw,
    weight: float = 30.0,
) -> StepOutput:
    """Losses of a batch, in the paper's order; arguments as `CounterfactualDistiller`."""
    cam = paper_cam(student, images, labels) if strategy.needs_cam else None
    mask = strategy.mask(cam, draw)

    counterfactual, hidden, dropped = images, None, None
    if not strategy.filling.leaves_out:
        counterfactual = strategy.filling.pixels(images, mask, draw.donors)
    elif strategy.region == "random":
        dropped = mask
    else:
        hidden = mask
    with torch.no_grad():
        target, _ = plain_forward(teacher, counterfactual, hidden, dropped)
    feature, _ = plain_forward(student.transformer, counterfactual, hidden, dropped)

    logits = student.head(plain_forward(student.transformer, images)[0])
    task, distill = F.cross_entropy(logits, labels), ((feature - target) ** 2).mean()
    return StepOutput(task + weight * distill, task.detach(), distill.detach(), logits.detach(), cam, mask)


def paper_cam(student: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:  # [N, L]
    """Relevance by Chefer et al.: ``R <- R + mean_h max(0, P * dP) R`` from the first layer to the last."""
    feature, maps = plain_forward(student.transformer, images)
    score = student.head(feature).gather(1, labels[:, None]).sum()
    grads = torch.autograd.grad(score, maps)
    n, tokens = images.shape[0], maps[0].shape[-1]
    relevance = torch.eye(tokens, dtype=maps[0].dtype, device=images.device).expand(n, tokens, tokens)
    for attention, grad in zip(maps, grads, strict=True):
        weights = (attention.detach() * grad).clamp(min=0).mean(dim=1)  # [N, T, T], or a pool's [N, 1, L]
        if attention is maps[-1] and student.transformer.pool is not None:  # the probe is no token: no identity
            return (weights @ relevance)[:, 0, student.transformer.config.prefix :]
        relevance = relevance + weights @ relevance
    config = student.transformer.config
    if config.pool == "mean":  # what attention brought from each patch, without its own share of the mean
        relevance = relevance - torch.eye(tokens, dtype=maps[0].dtype, device=images.device)
        return relevance[:, config.prefix :, config.prefix :].mean(dim=1)
    return relevance[:, 0, config.prefix :]


def plain_forward(
    model: VisionTransformer,
    images: Tensor,  # [N, 3, S, S]
    hidden: Tensor | None = None,  # [N, L] bool: hidden as attention keys
    dropped: Tensor | None = None,  # [N, L] bool: removed, the same number in every image
) -> tuple[Tensor, list[Tensor]]:  # [N, D]; K maps [N, H, T, T], and an attention pool's [N, H, 1, T]
    """The vision transformer with its attention maps written out."""
    config, pool = model.config, model.pool
    mean, std = (images.new_tensor(x)[:, None, None] for x in (config.mean, config.std))
    x = F.conv2d((images - mean) / std, model.patch_weight, model.patch_bias, config.patch_size).flatten(2).mT
    n, width = x.shape[0], x.shape[2]
    if model.position_embedding is not None and config.prefix_positions == 0:
        x = x + model.position_embedding
    if model.class_embedding is not None:
        x = torch.cat([model.class_embedding.expand(n, 1, -1), x], dim=1)
    if model.position_embedding is not None and config.prefix_positions == 1:
        x = x + model.position_embedding
    if model.registers is not None:
        at = int(config.class_token)
        x = torch.cat([x[:, :at], model.registers.expand(n, -1, -1), x[:, at:]], dim=1)
    x = model.ln_pre(x)
    angles = model.angles()
    turns = torch.zeros(n, x.shape[1], 1, device=x.device) if angles is None else angles.expand(n, -1, -1)
    seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if hidden is not None:
        seen[:, config.prefix :] = ~hidden
    if dropped is not None:
        kept = torch.cat([seen[:, : config.prefix], ~dropped], dim=1)
        x, turns, seen = (t[kept].view(n, -1, *t.shape[2:]) for t in (x, turns, seen))
    bias = torch.zeros(n, 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    bias = bias.masked_fill(~seen[:, None, None, :], torch.finfo(x.dtype).min)
    maps = []
    for block in cast(list[Block], model.blocks):
        q, k, v = split_heads(block.attn.qkv(block.ln_1(x)), config.heads)
        q, k = optional(block.attn.q_norm, q), optional(block.attn.k_norm, k)
        if config.rotary is not None:
            q, k = turn(q, turns, config.rotary.halves), turn(k, turns, config.rotary.halves)
        attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1)
        maps.append(attention)
        o = (attention @ v).transpose(1, 2).reshape(n, -1, width)
        o = block.attn.out(optional(block.attn.norm, o))
        x = x + (o * block.scale_1 if config.layer_scale else o)
        o = activate(block.fc(block.ln_2(x)), config.activation, config.gated_mlp)
        o = block.proj(optional(block.mlp_norm, o))
        x = x + (o * block.scale_2 if config.layer_scale else o)
    x = x if config.pool_norm else model.ln_post(x)
    if config.pool == "class":
        feature = x[:, 0]
    elif config.pool == "mean":
        patches, count = x[:, config.prefix :], seen[:, config.prefix :, None]
        feature = (patches * count).sum(dim=1) / count.sum(dim=1).clamp(min=1)
        feature = model.ln_post(feature) if config.pool_norm else feature
    else:
        assert pool is not None
        heads = config.pool_heads or config.heads
        q = split_heads(pool.attn.qkv(pool.probe[None]), heads)[0]  # [H, 1, d]
        _, k, v = split_heads(pool.attn.qkv(x), heads)
        q, k = optional(pool.attn.q_norm, q), optional(pool.attn.k_norm, k)
        attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1)
        maps.append(attention * (bias == 0))  # nothing, where all are hidden
        o = (maps[-1] @ v).transpose(1, 2).reshape(n, width)
        x = pool.attn.out(optional(pool.attn.norm, o))
        feature = x + pool.proj(activate(pool.fc(pool.ln(x)), config.activation))
    if model.projection is not None:
        feature = feature @ model.projection
        feature = feature if model.projection_bias is None else feature + model.projection_bias
    return feature, maps


def optional(module: nn.Module | None, x: Tensor) -> Tensor:
    """What the module makes of it, where there is one."""
    return x if module is None else module(x)


def turn(x: Tensor, angles: Tensor, halves: bool) -> Tensor:
    """``x [N, H, T, d]`` by ``angles [N, T, d / 2]``: pairs of channels as complex numbers."""
    pairs = x.unflatten(-1, (2, -1)).mT if halves else x.unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles)[:, None]
    pairs = torch.view_as_real(turned)
    return (pairs.mT if halves else pairs).flatten(-2)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[…, T, 3 D]`` → queries, keys and values ``[…, H, T, d]``."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)
    return q, k, v


def activate(hidden: Tensor, activation: str, gated: bool = False) -> Tensor:
    """Quick GELU, GELU, its approximation by tanh, or SiLU; of the first half, times the other, where ``gated``."""
    if gated:
        return activate(hidden[..., : hidden.shape[-1] // 2], activation) * hidden[..., hidden.shape[-1] // 2 :]
    if activation == "silu":
        return hidden * torch.sigmoid(hidden)
    if activation == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
