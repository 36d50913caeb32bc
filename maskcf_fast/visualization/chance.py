"""Everything drawn at random for a look at some images: the same for all strategies, so that they compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import Draw, MaskStrategy
from ..ops import sample_donors, select_patches


@dataclass(frozen=True)
class Chance:
    """Donors and noise of a batch of N images, from which every strategy takes what it needs.

    Attributes:
        single: Donor of each image, int64 ``[N]``: a permutation. Unlike the paper's, it gives no image to itself,
            because a picture with nothing changed shows nothing.
        multi: Donor of each patch, int64 ``[N, L]``; the image itself only where it is alone, as in ``single``.
        noise: Uniform in [0, 1), float32 ``[N, L]``; random masks are cut from it.
    """

    single: Tensor
    multi: Tensor
    noise: Tensor

    @classmethod
    def draw(cls, n: int, num_patches: int, generator: torch.Generator) -> Chance:
        """Draw all three, on the CPU, where ``generator`` is."""
        single, multi = torch.zeros(1, dtype=torch.int64), torch.zeros(1, num_patches, dtype=torch.int64)
        if n > 1:
            single = sample_donors(n, exclude_self=True, generator=generator)
            multi = sample_donors(n, num_patches, generator=generator)
        return cls(single, multi, torch.rand(n, num_patches, generator=generator))

    def of(self, strategy: MaskStrategy) -> Draw:
        """What `MaskStrategy.draw` would have returned, had it drawn these numbers."""
        donors = {"single": self.single, "multi": self.multi, "none": None}[strategy.fill]
        if strategy.rate is None:
            return Draw(donors, None)
        if strategy.fill == "none":
            dropped = strategy.dropped(self.noise.shape[1])
            return Draw(donors, select_patches(self.noise, top_k=dropped, region="context"))
        return Draw(donors, self.noise < strategy.rate)
