"""One training step exactly as the paper's method describes it: the contract of the fast step.

Written plainly and on its own: attention maps and T×T relevance products in memory, counterfactual images made
of pixels, separate forward passes, every token computed in every block. It shares only the model's parameters,
the selection of patches and the pixel refill with the fast step.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import ImageClassifier, VisionTransformer
from ..models.vit import Block
from ..ops import refill_patches
from .methods import StepOutput
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
    if draw.donors is not None:
        counterfactual = refill_patches(images, mask, draw.donors)
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
        weights = (attention.detach() * grad).clamp(min=0).mean(dim=1)  # [N, T, T]
        relevance = relevance + weights @ relevance
    return relevance[:, 0, 1:]


def plain_forward(
    model: VisionTransformer,
    images: Tensor,  # [N, 3, S, S]
    hidden: Tensor | None = None,  # [N, L] bool: hidden as attention keys
    dropped: Tensor | None = None,  # [N, L] bool: removed, the same number in every image
) -> tuple[Tensor, list[Tensor]]:  # [N, D] and K maps [N, H, T, T]
    """The vision transformer with its attention maps written out."""
    config = model.config
    mean, std = (images.new_tensor(x)[:, None, None] for x in (config.mean, config.std))
    x = F.conv2d((images - mean) / std, model.patch_weight, stride=config.patch_size).flatten(2).mT
    x = torch.cat([model.class_embedding.expand(len(x), 1, -1), x], dim=1) + model.position_embedding
    x = model.ln_pre(x)
    n, width = x.shape[0], x.shape[2]
    cls_token = torch.zeros(n, 1, dtype=torch.bool, device=x.device)
    if dropped is not None:
        x = x[~torch.cat([cls_token, dropped], dim=1)].view(n, -1, width)
    bias = torch.zeros(n, 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    if hidden is not None:
        bias = bias.masked_fill(torch.cat([cls_token, hidden], dim=1)[:, None, None, :], float("-inf"))
    maps = []
    for block in cast(list[Block], model.blocks):
        qkv = block.attn.qkv(block.ln_1(x)).view(n, -1, 3, config.heads, width // config.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, H, T, d]
        attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1)
        maps.append(attention)
        x = x + block.attn.out((attention @ v).transpose(1, 2).reshape(n, -1, width))
        h = block.fc(block.ln_2(x))
        h = h * torch.sigmoid(1.702 * h) if config.activation == "quick_gelu" else F.gelu(h)
        x = x + block.proj(h)
    feature = model.ln_post(x)[:, 0]
    return feature if model.projection is None else feature @ model.projection, maps
