"""Everything drawn at random for a look at some images: the same for all strategies, so that they compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import FILLS, Draw, MaskStrategy


@dataclass(frozen=True)
class Draws:
    """Donors and noise of a batch of N images, from which every strategy takes what it needs.

    Attributes:
        donors: By fill, as `Fill.donors` draws them. Unlike the paper's, they give no image to itself unless it is
            alone, because a picture with nothing changed shows nothing.
        noise: Uniform in [0, 1), float32 ``[N, L]``; random masks are cut from it.
    """

    donors: Mapping[str, Tensor | None]
    noise: Tensor

    @classmethod
    def draw(cls, n: int, num_patches: int, generator: torch.Generator) -> Draws:
        """Draw all, on the CPU, where ``generator`` is."""
        donors = {}
        for name, fill in FILLS.items():
            drawn = fill.donors(max(n, 2), num_patches, exclude_self=True, generator=generator)
            donors[name] = None if drawn is None else drawn[:n].clamp(max=n - 1)
        return cls(donors, torch.rand(n, num_patches, generator=generator))

    def of(self, strategy: MaskStrategy) -> Draw:
        """What `MaskStrategy.draw` would have returned, had it drawn these numbers."""
        mask = None if strategy.rate is None else strategy.filling.random_mask(self.noise, strategy.rate)
        return Draw(self.donors[strategy.fill], mask)
