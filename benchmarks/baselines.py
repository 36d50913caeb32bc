"""What one writes without this package: each op in plain PyTorch, as papers and repositories have it.

Each takes the tensors that the op takes, in the same order, and gives the same result. Grids are square; shapes:
images ``[N, C, S, S]``, cam and mask ``[N, L]``, donors ``[N]`` or ``[N, L]``, tokens ``[N, 1 + L, D]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def select_threshold(cam: Tensor, threshold: float) -> Tensor:
    """Scores against a cut."""
    return cam / (cam.amax(dim=1, keepdim=True) + 1e-8) > threshold


def select_top_k(cam: Tensor, k: int) -> Tensor:
    """The indices of the highest scores, scattered; which of equal scores is taken is left open."""
    return torch.zeros_like(cam, dtype=torch.bool).scatter(1, cam.topk(k, dim=1).indices, True)


def pixel_mask(mask: Tensor, images: Tensor) -> Tensor:
    """Every patch's value at every of its pixels, ``[N, 1, S, S]``."""
    side = math.isqrt(mask.shape[1])
    patch = images.shape[-1] // side
    return mask.view(-1, 1, side, side).repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)


def donor_images(images: Tensor, donors: Tensor) -> Tensor:
    """The images to take pixels from; with a donor per patch, put together from patches."""
    if donors.ndim == 1:
        return images[donors]
    n, c, size, _ = images.shape
    side = math.isqrt(donors.shape[1])
    patch = size // side
    patches = images.view(n, c, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [N, L, C, P, P]
    patches = patches[donors, torch.arange(side * side, device=images.device)]
    return patches.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).reshape(n, c, size, size)


def refill_blend(images: Tensor, mask: Tensor, donors: Tensor) -> Tensor:
    """The paper's formula: a mask of ones and zeros, multiplied."""
    m = pixel_mask(mask, images).to(images.dtype)
    return images * (1 - m) + donor_images(images, donors) * m


def refill_where(images: Tensor, mask: Tensor, donors: Tensor) -> Tensor:
    """The same by selection, which is faster."""
    return torch.where(pixel_mask(mask, images), donor_images(images, donors), images)


def counterfactual(
    images: Tensor, cam: Tensor, donors: Tensor, threshold: float, refill: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """Selection, then a refill; the mask as well."""
    mask = select_threshold(cam, threshold)
    return refill(images, mask, donors), mask


def patchify(images: Tensor, patch_size: int, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, S, S, C]`` uint8 to float, normalised with ``mean, std [C, 1, 1]``, unfolded: ``[N, L, C * P * P]``."""
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return F.unfold(pixels, patch_size, stride=patch_size).mT.to(dtype)


def gather_tokens(tokens: Tensor, mask: Tensor, donors: Tensor) -> Tensor:
    """Donor tokens by index, then selection; the class token stays."""
    if donors.ndim == 1:
        others = tokens[donors, 1:]
    else:
        others = tokens[donors, torch.arange(1, tokens.shape[1], device=tokens.device)]
    return torch.cat([tokens[:, :1], torch.where(mask[..., None], others, tokens[:, 1:])], dim=1)


def bias_gelu(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """As a layer with bias and a model's activation do it; OpenAI's approximation by its definition."""
    z = x + bias.to(x.dtype)
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def residual_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As a pre-norm block does it: statistics in float32, by PyTorch on a CPU and by autocast's casts on a GPU."""
    total = x + branch
    if x.device.type == "cpu":
        return total, F.layer_norm(total, weight.shape, weight, bias)
    return total, F.layer_norm(total.float(), weight.shape, weight, bias).to(x.dtype)


def attention_relevance(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, relevance: Tensor) -> Tensor:
    """With the attention map and its gradient, ``[N, H, T, T]``, in memory."""
    attention = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    weights = (attention * (grad_out @ v.mT)).clamp(min=0).mean(dim=1)  # [N, T, T]
    return relevance + (relevance[:, None].to(weights.dtype) @ weights).squeeze(1)
