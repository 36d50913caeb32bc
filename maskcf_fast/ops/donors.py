"""Drawing donor images for refilling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import check_int, shown


def sample_donors(
    n: int,
    num_patches: int | None = None,
    *,
    exclude_self: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the donors of a batch.

    Single-fill (``num_patches=None``): one donor per image, a random permutation of the batch; an image may
    draw itself, unless ``exclude_self``. Multi-fill: one donor per patch, uniform over the *other* images.

    Args:
        n: Batch size.
        num_patches: Patches per image ``L`` for multi-fill, None for single-fill.
        exclude_self: Single-fill along a random cycle through the batch instead: every image still gives once,
            never to itself, and each donor is uniform over the other images. Multi-fill never draws itself.
        generator: Source of randomness; must live on ``device``.
        device: Where the result lives; the generator's device, or the CPU, when None.

    Returns:
        int64, ``[N]`` (single-fill) or ``[N, L]`` (multi-fill), indices into the batch.

    Raises:
        ValueError: An empty batch, or a batch of one (no other image to draw from) with multi-fill or
            ``exclude_self``.
    """
    check_int("n", n, 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {shown(generator)}")
    if device is None and generator is not None:
        device = generator.device
    if num_patches is None:
        order = torch.randperm(n, generator=generator, device=device)
        if not exclude_self:
            return order
        if n == 1:
            raise ValueError("exclude_self needs at least 2 images in the batch, got 1: there is no other to draw from")
        return torch.empty_like(order).scatter_(0, order, order.roll(1))
    check_int("num_patches", num_patches, 1)
    if n == 1:
        raise ValueError("multi-fill needs at least 2 images in the batch, got 1: there is no other to draw from")
    shift = torch.randint(1, n, (n, num_patches), generator=generator, device=device)
    return (torch.arange(n, device=device)[:, None] + shift) % n
