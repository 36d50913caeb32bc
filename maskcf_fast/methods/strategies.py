"""The masking strategies: which patches are masked × what fills them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.names import unknown
from ..models import Backbone
from ..ops import select_patches
from .fills import FILLS, REGIONS, Fill


def strategy_names() -> tuple[str, ...]:
    """All there are: every region with every fill."""
    return tuple(f"{region}-{fill}" for region in REGIONS for fill in FILLS)


class Draw(NamedTuple):
    """All randomness of one step, drawn up front so that every implementation gives the same answer."""

    donors: Tensor | None  # [N] or [N, L] int64; None where nothing comes from other images
    mask: Tensor | None  # [N, L] bool; only for a random region


@dataclass(frozen=True)
class MaskStrategy:
    """Which patches are masked, and what fills them.

    Attributes:
        region: ``"object"`` (relevant patches), ``"context"`` (the others) or ``"random"``.
        fill: ``"single"`` (one donor image), ``"multi"`` (a donor per patch), ``"none"`` (left out), or the name of
            another one in `FILLS`.
        threshold: Cut on the normalised relevance, for object and context. Exactly one of it and ``top_k``.
        top_k: Number of patches, for object and context.
        rate: Share of masked patches, for random: the probability of each patch, or, where they are left out, exactly
            ``L - int(L * (1 - rate))`` of every image.
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
                f"got threshold={self.threshold}, top_k={self.top_k}, rate={self.rate}"
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
        region, _, fill = name.partition("-")
        if threshold is None and top_k is None and rate is None:
            cut = FILLS[fill].cuts[region]
            threshold, rate = (None, cut) if region == "random" else (cut, None)
        return cls(region, fill, threshold, top_k, rate, exclude_self)

    @property
    def name(self) -> str:
        """``"region-fill"``."""
        return f"{self.region}-{self.fill}"

    @property
    def needs_cam(self) -> bool:
        """Whether the mask depends on a relevance map."""
        return self.region != "random"

    @property
    def filling(self) -> Fill:
        """What fills them."""
        return FILLS[self.fill]

    @property
    def fixed_length(self) -> bool:
        """Whether the network sees as many patches of every image, known before the masks are."""
        return not self.filling.leaves_out or self.masked(1) is not None

    def masked(self, num_patches: int) -> int | None:
        """Masked patches of every image; None where it differs between images."""
        return self.top_k if self.rate is None else self.filling.dropped(self.rate, num_patches)

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
        donors = self.filling.donors(n, num_patches, exclude_self=self.exclude_self, generator=generator, device=device)
        if self.rate is None:
            return Draw(donors, None)
        noise = torch.rand(n, num_patches, generator=generator, device=device)
        return Draw(donors, self.filling.random_mask(noise, self.rate))

    def mask(self, cam: Tensor | None, draw: Draw) -> Tensor:
        """The mask ``[N, L]`` bool: selected from ``cam [N, L]``, or the random one that was drawn."""
        if draw.mask is not None:
            return draw.mask
        if cam is None:
            raise UserError(f"strategy {self.name!r} selects from a relevance map: cam must be given")
        return select_patches(cam, threshold=self.threshold, top_k=self.top_k, region=self.region)

    def encode(self, backbone: Backbone, tokens: Tensor, mask: Tensor, draw: Draw) -> Tensor:
        """Features ``[N, D]`` of the counterfactual images, from the tokens of the clean ones."""
        return backbone.encode_filled(self.filling, tokens, mask, draw.donors, self.masked(mask.shape[1]))


def _check_name(name: str) -> None:
    if name not in strategy_names():
        raise unknown("strategy", name, strategy_names())
