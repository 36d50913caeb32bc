"""One training step exactly as the paper's method describes it: the contract of the fast step.

Written plainly and on its own: attention maps and T×T relevance products in memory, counterfactual images made
of pixels, separate forward passes, every token computed in every block. It shares only the model's parameters,
the selection of patches and a fill's pixels with the fast step.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

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
    feature, _ = plain_forward(student.backbone, counterfactual, hidden, dropped)

    logits = student.head(plain_forward(student.backbone, images)[0])
    task, distill = F.cross_entropy(logits, labels), ((feature - target) ** 2).mean()
    return StepOutput(task + weight * distill, task.detach(), distill.detach(), logits.detach(), cam, mask)


def paper_cam(student: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:  # [N, L]
    """Relevance by Chefer et al.: ``R <- R + mean_h max(0, P * dP) R`` from the first layer to the last."""
    feature, maps = plain_forward(student.backbone, images)
    score = student.head(feature).gather(1, labels[:, None]).sum()
    grads = torch.autograd.grad(score, maps)
    n, tokens = images.shape[0], maps[0].shape[-1]
    relevance = torch.eye(tokens, dtype=maps[0].dtype, device=images.device).expand(n, tokens, tokens)
    for attention, grad in zip(maps, grads, strict=True):
        weights = (attention.detach() * grad).clamp(min=0).mean(dim=1)  # [N, T, T], or a pool's [N, 1, L]
        if attention is maps[-1] and student.backbone.pool is not None:  # the probe is no token: no identity
            return (weights @ relevance)[:, 0]
        relevance = relevance + weights @ relevance
    return relevance[:, 0, 1:]


def plain_forward(
    model: VisionTransformer,
    images: Tensor,  # [N, 3, S, S]
    hidden: Tensor | None = None,  # [N, L] bool: hidden as attention keys
    dropped: Tensor | None = None,  # [N, L] bool: removed, the same number in every image
) -> tuple[Tensor, list[Tensor]]:  # [N, D]; K maps [N, H, T, T], and an attention pool's [N, H, 1, L]
    """The vision transformer with its attention maps written out."""
    config, pool = model.config, model.pool
    mean, std = (images.new_tensor(x)[:, None, None] for x in (config.mean, config.std))
    x = F.conv2d((images - mean) / std, model.patch_weight, model.patch_bias, config.patch_size).flatten(2).mT
    n, width = x.shape[0], x.shape[2]
    if model.class_embedding is not None:
        x = torch.cat([model.class_embedding.expand(n, 1, -1), x], dim=1)
    x = model.ln_pre(x + model.position_embedding)
    cls_token = torch.zeros(n, int(pool is None), dtype=torch.bool, device=x.device)
    if dropped is not None:
        x = x[~torch.cat([cls_token, dropped], dim=1)].view(n, -1, width)
    bias = torch.zeros(n, 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    if hidden is not None:
        bias = bias.masked_fill(torch.cat([cls_token, hidden], dim=1)[:, None, None, :], torch.finfo(x.dtype).min)
    maps = []
    for block in cast(list[Block], model.blocks):
        q, k, v = split_heads(block.attn.qkv(block.ln_1(x)), config.heads)
        attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1)
        maps.append(attention)
        x = x + block.attn.out((attention @ v).transpose(1, 2).reshape(n, -1, width))
        x = x + block.proj(activate(block.fc(block.ln_2(x)), config.activation))
    x = model.ln_post(x)
    if pool is None:
        feature = x[:, 0]
    else:
        q = split_heads(pool.attn.qkv(pool.probe[None]), config.heads)[0]  # [H, 1, d]
        _, k, v = split_heads(pool.attn.qkv(x), config.heads)
        attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1)
        maps.append(attention * (bias == 0))  # nothing, where all are hidden
        x = pool.attn.out((maps[-1] @ v).transpose(1, 2).reshape(n, width))
        feature = x + pool.proj(activate(pool.fc(pool.ln(x)), config.activation))
    return feature if model.projection is None else feature @ model.projection, maps


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[…, T, 3 D]`` → queries, keys and values ``[…, H, T, d]``."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)
    return q, k, v


def activate(hidden: Tensor, activation: str) -> Tensor:
    """Quick GELU, GELU, or its approximation by tanh."""
    if activation == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
