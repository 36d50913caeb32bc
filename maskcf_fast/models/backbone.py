"""What the step asks of a model: the compact vision transformer's interface, which another library's can have, too."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor, nn

from .blocks import Tap

Recompute = bool | Literal["gelu"]  # see `VisionTransformer.recompute`


class Shape(Protocol):
    """What must be known of a model's architecture; `VisionTransformerConfig` says what each is."""

    @property
    def native(self) -> bool:
        """Whether it is a `VisionTransformer`: then taps have the layers' inputs, and tokens are embedded patches."""

    @property
    def image_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def depth(self) -> int: ...
    @property
    def num_patches(self) -> int: ...
    @property
    def prefix(self) -> int: ...
    @property
    def feature_dim(self) -> int: ...
    @property
    def pool(self) -> str | tuple[float, ...]:
        """Where the feature is read, or by which weights ``[T]`` from all tokens."""


class Backbone(nn.Module):
    """Image → feature, in two parts: ``embed`` each patch alone, ``encode`` what may have been refilled in between."""

    config: Shape
    recompute: Recompute = False

    def rows(self, images: Tensor) -> Tensor:
        """The first part of `embed`, which has no parameters."""
        raise NotImplementedError

    def embed_rows(self, rows: Tensor) -> Tensor:
        """The rest of `embed`."""
        raise NotImplementedError

    def encode(self, tokens: Tensor, *, record: bool = False) -> tuple[Tensor, list[Tap]]:
        """What `embed` made to features ``[N, D]``, and with ``record`` each layer's tap."""
        raise NotImplementedError

    def encode_filled(
        self, fill: Any, tokens: Tensor, mask: Tensor, donors: Tensor | None, dropped: int | None
    ) -> Tensor:
        """Features of the images that a fill makes of those with these tokens; arguments as `Fill.encode`."""
        return fill.encode(self, tokens, mask, donors, dropped)

    def embed(self, images: Tensor) -> Tensor:
        """Pixels to tokens, every patch alone.

        Args:
            images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1], not normalised.
        """
        return self.embed_rows(self.rows(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images (as `embed` takes them) to features ``[N, D]``."""
        return self.encode(self.embed(images))[0]
