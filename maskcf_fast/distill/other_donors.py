"""Masking strategies whose donors are always other images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops import sample_donors
from .strategies import Draw, MaskStrategy


@dataclass(frozen=True)
class OtherDonors(MaskStrategy):
    """A `MaskStrategy` whose single-fill never gives an image its own patches back; else unchanged.

    The paper draws a permutation, in which one image of the batch on average draws itself and stays as it is.
    """

    def draw(
        self,
        n: int,
        num_patches: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Draw:
        """As `MaskStrategy.draw`.

        Raises:
            ValueError: A batch of one, with a fill.
        """
        draw = super().draw(n, num_patches, generator=generator, device=device)
        if self.fill != "single":
            return draw
        return draw._replace(donors=sample_donors(n, exclude_self=True, generator=generator, device=device))
