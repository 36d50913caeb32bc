"""Batches whose images and labels are mixed in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.optional import need


class Mixup:
    """torchvision's mixup: every image with the one before it in the batch, by a share drawn from Beta(alpha, alpha).

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.

    Args:
        alpha: Of the distribution; the larger, the nearer the shares are to a half.
        num_classes: Of the labels.

    Raises:
        MissingLibraryError: torchvision is not installed.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        need("torchvision")
        from torchvision.transforms import v2

        self.mix: Any = v2.MixUp(alpha=alpha, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: uint8 ``[N, S, S, 3]``.
            labels: int64 ``[N]``.
            seed: All that the share depends on.

        Returns:
            float32 images ``[N, 3, S, S]`` in [0, 1] and labels ``[N, classes]``, whose rows sum to 1.
        """
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            images, labels = self.mix(images.permute(0, 3, 1, 2) / 255, labels)
        return images, labels
