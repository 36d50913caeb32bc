"""The nine masking strategies: which patches are masked × what fills them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.names import unknown
from ..ops import sample_donors, select_patches

# The paper's settings: threshold for object and context masks, rate for random ones.
PAPER_CUTS = {
    "random-none": 0.75,
    "random-single": 0.5,
    "random-multi": 0.5,
    "object-none": 0.3,
    "object-single": 0.3,
    "object-multi": 0.6,
    "context-none": 0.6,
    "context-single": 0.5,
    "context-multi": 0.3,
}


class Draw(NamedTuple):
    """All randomness of one step, drawn up front so that every implementation gives the same answer."""

    donors: Tensor | None  # [N] or [N, L] int64; None for no-fill
    mask: Tensor | None  # [N, L] bool; only for a random region


@dataclass(frozen=True)
class MaskStrategy:
    """Which patches are masked, and what fills them.

    Attributes:
        region: ``"object"`` (relevant patches), ``"context"`` (the others) or ``"random"``.
        fill: ``"single"`` (one donor image), ``"multi"`` (a donor per patch) or ``"none"`` (dropped).
        threshold: Cut on the normalised relevance, for object and context. Exactly one of it and ``top_k``.
        top_k: Number of patches, for object and context.
        rate: Share of masked patches, for random: the probability of each patch with a fill; without one,
            exactly ``L - int(L * (1 - rate))`` patches are dropped.
        exclude_self: Single-fill: no image draws itself. The paper's permutation lets one on average do so.
    """

    region: str
    fill: str
    threshold: float | None = None
    top_k: int | None = None
    rate: float | None = None
    exclude_self: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.region == "random":
            if self.threshold is not None or self.top_k is not None or self.rate is None:
                raise UserError(
                    f"a random mask takes a rate and nothing else, got rate={self.rate}, "
                    f"threshold={self.threshold}, top_k={self.top_k}"
                )
            if not 0 <= self.rate <= 1:
                raise UserError(f"rate must lie between 0 and 1, got {self.rate}")
        elif self.rate is not None or (self.threshold is None) == (self.top_k is None):
            raise UserError(
                f"an {self.region} mask takes exactly one of threshold and top_k and no rate, "
                f"got threshold={self.threshold}, top_k={self.top_k}, rate={self.rate} "
                "(on the command line, --method.threshold None takes a preset's back)"
            )
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k must not be negative, got {self.top_k}")
        if self.threshold is not None and self.threshold != self.threshold:
            raise UserError("threshold must be a number, got NaN")

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        rate: float | None = None,
        exclude_self: bool = False,
    ) -> MaskStrategy:
        """A strategy such as ``"object-single"``, with the paper's threshold or rate unless one is given."""
        _check_name(name)
        region, fill = name.split("-")
        if threshold is None and top_k is None and rate is None:
            if region == "random":
                rate = PAPER_CUTS[name]
            else:
                threshold = PAPER_CUTS[name]
        return cls(region, fill, threshold, top_k, rate, exclude_self)

    @property
    def name(self) -> str:
        """``"region-fill"``."""
        return f"{self.region}-{self.fill}"

    @property
    def needs_cam(self) -> bool:
        """Whether the mask depends on a relevance map."""
        return self.region != "random"

    def dropped(self, num_patches: int) -> int | None:
        """Patches that no-fill drops from every image; None where it differs between images."""
        if self.region == "random" and self.fill == "none":
            assert self.rate is not None
            return num_patches - int(num_patches * (1 - self.rate))
        return self.top_k

    def draw(
        self,
        n: int,
        num_patches: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Draw:
        """Draw the donors, and the mask if it is a random one.

        Raises:
            ValueError: Multi-fill or ``exclude_self`` with a batch of one, or a generator on another device.
        """
        donors = mask = None
        if self.fill != "none":
            per_patch = num_patches if self.fill == "multi" else None
            donors = sample_donors(n, per_patch, exclude_self=self.exclude_self, generator=generator, device=device)
        if self.rate is not None:
            noise = torch.rand(n, num_patches, generator=generator, device=device)
            if self.fill == "none":
                chosen = noise.argsort(dim=1)[:, : self.dropped(num_patches)]
                mask = torch.zeros(n, num_patches, dtype=torch.bool, device=noise.device)
                mask.scatter_(1, chosen, True)
            else:
                mask = noise < self.rate
        return Draw(donors, mask)

    def mask(self, cam: Tensor | None, draw: Draw) -> Tensor:
        """The mask ``[N, L]`` bool: selected from ``cam [N, L]``, or the random one that was drawn."""
        if draw.mask is not None:
            return draw.mask
        if cam is None:
            raise UserError(f"strategy {self.name!r} selects from a relevance map: cam must be given")
        return select_patches(cam, threshold=self.threshold, top_k=self.top_k, region=self.region)


def _check_name(name: str) -> None:
    if name not in PAPER_CUTS:
        raise unknown("strategy", name, PAPER_CUTS)
