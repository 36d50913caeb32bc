"""What masked patches are filled with. A fill that `register_fill` knows makes a strategy with every region.

Whoever needs to know anything about a fill asks the object: the step, the paper's order, the trainer and the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import VisionTransformer
from ..ops import drop_tokens, gather_tokens, pack_tokens, refill_patches, sample_donors, select_patches
from ..ops.drop import Packing

REGIONS = ("object", "context", "random")


@dataclass(frozen=True)
class Fill:
    """A fill; subclasses give `encode` and, unless they leave patches out, `pixels`.

    Attributes:
        name: The second part of a strategy's name.
        cuts: The paper's settings by region: threshold for object and context masks, rate for random ones.
        other_images: Whether it takes from other images of the batch, and so needs two.
        per_patch: Then, whether each patch comes from an image of its own.
        leaves_out: Whether masked patches are left out of the network's input, which nothing is pasted into.
    """

    name: str
    cuts: Mapping[str, float]
    other_images: bool = False
    per_patch: bool = False
    leaves_out: bool = False

    def donors(
        self,
        n: int,
        num_patches: int,
        *,
        exclude_self: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor | None:
        """As `sample_donors` draws them, int64 ``[N]`` or ``[N, L]``; None where patches come from no image."""
        if not self.other_images:
            return None
        patches = num_patches if self.per_patch else None
        return sample_donors(n, patches, exclude_self=exclude_self, generator=generator, device=device)

    def dropped(self, rate: float, num_patches: int) -> int | None:
        """Patches of every image that a random mask takes; None where each is taken with probability ``rate``."""
        return None

    def random_mask(self, noise: Tensor, rate: float) -> Tensor:
        """A random mask ``[N, L]`` bool from noise in [0, 1)."""
        exactly = self.dropped(rate, noise.shape[1])
        return noise < rate if exactly is None else select_patches(noise, top_k=exactly, region="context")

    def encode(
        self, backbone: VisionTransformer, tokens: Tensor, mask: Tensor, donors: Tensor | None, dropped: int | None
    ) -> Tensor:
        """Features of the counterfactual images from the tokens of the clean ones.

        Args:
            backbone: The model.
            tokens: ``[N, T, width]``, as `VisionTransformer.embed` makes them.
            mask: ``[N, L]`` bool.
            donors: As `donors` draws them.
            dropped: Masked patches of every image, where the number is known and the same.

        Returns:
            ``[N, D]``.
        """
        raise NotImplementedError

    def pixels(self, images: Tensor, mask: Tensor, donors: Tensor | None) -> Tensor:
        """The counterfactual images of ``images [N, C, H, W]``, uint8 or float."""
        raise NotImplementedError


FILLS: dict[str, Fill] = {}


def register_fill(fill: Fill) -> None:
    """Make a strategy of the fill with every region."""
    FILLS[fill.name] = fill


class LeftOut(Fill):
    """Nothing: masked patches are left out."""

    def dropped(self, rate: float, num_patches: int) -> int | None:
        """As many as leave ``int(L * (1 - rate))``."""
        return num_patches - int(num_patches * (1 - rate))

    def encode(
        self, backbone: VisionTransformer, tokens: Tensor, mask: Tensor, donors: Tensor | None, dropped: int | None
    ) -> Tensor:
        """As `Fill.encode`: shorter sequences, packed where their lengths differ."""
        take = pack_tokens if dropped is None else partial(drop_tokens, dropped=dropped)
        prefix = backbone.config.prefix
        rows, places = take(tokens, mask, prefix=prefix)
        if len(rows) == 0:  # no image has a token left
            return backbone.encode(tokens[:, :0])[0]
        angles = backbone.angles()
        if angles is not None:  # each patch keeps its own; as many are left as there are rows
            kept = F.pad(mask, (prefix, 0)).flatten().argsort(stable=True)[: rows[..., 0].numel()]
            angles = angles[kept % len(angles)].view(*rows.shape[:-1], -1)
        packing = places if isinstance(places, Packing) else None
        return backbone.encode(rows, packing=packing, angles=angles)[0]


class FromOthers(Fill):
    """The same patch of another image: of one for all patches, or of one for each."""

    def encode(
        self, backbone: VisionTransformer, tokens: Tensor, mask: Tensor, donors: Tensor | None, dropped: int | None
    ) -> Tensor:
        """As `Fill.encode`: a patch is embedded alone, so that embedded patches are pasted."""
        assert donors is not None
        return backbone.encode(gather_tokens(tokens, mask, donors, prefix=backbone.config.prefix))[0]

    def pixels(self, images: Tensor, mask: Tensor, donors: Tensor | None) -> Tensor:
        """As `Fill.pixels`."""
        assert donors is not None
        return refill_patches(images, mask, donors)


register_fill(FromOthers("single", {"object": 0.3, "context": 0.5, "random": 0.5}, other_images=True))
register_fill(FromOthers("multi", {"object": 0.6, "context": 0.3, "random": 0.5}, other_images=True, per_patch=True))
register_fill(LeftOut("none", {"object": 0.3, "context": 0.6, "random": 0.75}, leaves_out=True))
