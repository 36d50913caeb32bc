"""Another library's model, unmodified, with the interface that the step asks for.

What lies between ``embed`` and ``encode`` are pixels: refilled ones go through the whole model again, as in the paper's
order. The map is made of the clean forward pass, in which every attention call is recorded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.checks import check_tensor
from ..core.errors import UserError
from ..models import Backbone, Tap
from ..models.libraries import Unmodified, Unsupported
from ..models.sources import load_unmodified
from ..models.vit import check_pixels
from .calls import Call
from .layers import select_layers
from .models import known_readout
from .readout import Ambiguous, count_prefix, start_weights
from .record import record_attention

COST = (
    "pixels are refilled, so that the student and the teacher run whole on the counterfactual images, and every token "
    "passes every layer"
)


@dataclass(frozen=True)
class LibraryConfig:
    """What is known of an unmodified model; the attributes are those of `VisionTransformerConfig`.

    Attributes:
        name: As `load_unmodified` takes it.
        image_size: Side of the square input in pixels.
        patch_size: Side of a token's part of it.
        mean: Per-channel mean that the input is normalised with.
        std: Per-channel standard deviation.
        depth: Number of attention layers, without a pool.
        feature_dim: Dimension of the feature.
        prefix: Tokens before the patches.
        mixed: Whether convolutions between its attention layers, too, carry content from patch to patch.
        pool: ``"attention"``, or the weights ``[T]`` by which the feature reads the last layer's tokens.
    """

    name: str
    image_size: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    depth: int
    feature_dim: int
    prefix: int
    mixed: bool
    pool: str | tuple[float, ...]
    native: ClassVar[bool] = False

    @property
    def num_patches(self) -> int:
        """Patches per image, ``L``."""
        return (self.image_size // self.patch_size) ** 2


class LibraryBackbone(Backbone):
    """A model of another library, of which nothing is changed: it is always in evaluation mode, its dropout off.

    Parameters that the feature does not depend on, such as a classifier's, rest.

    Args:
        name: ``timm:…``, ``open_clip:…`` or ``hf:…``, as `load_unmodified` takes it.
        image_size: Side of the images in pixels, by default the model's own.
        weights: Its tensors by their names in the library; by default those that ``name`` stands for.

    Raises:
        ImportError: The library is not installed.
        ValueError: The model cannot be had, or its attention cannot be seen or is not over all tokens; with the reason.
    """

    config: LibraryConfig
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, image_size: int | None = None, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        try:
            whole = load_unmodified(name, image_size, pretrained=weights is None)
        except Unsupported as error:
            raise UserError(f"{name} cannot be trained unmodified either: {error.reason}") from error
        self.module, self.features, self.call = whole.module.eval(), whole.features, whole.call
        if weights is not None:
            try:
                self.module.load_state_dict(weights)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"the weights are not those of {name} at {whole.image_size} px: {reason} If a run at another size "
                    "wrote them, give its --model.image-size"
                ) from error
        self.register_buffer("mean", torch.tensor(whole.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(whole.std)[:, None, None], persistent=False)
        try:
            self.config = self._looked_at(name, whole)
        except (ValueError, RuntimeError, TypeError, AssertionError) as error:  # also the library's own, of a size
            reason = error.reason if isinstance(error, Ambiguous) else str(error)
            raise UserError(f"{name} cannot be trained unmodified either: {reason}") from error

    def _looked_at(self, name: str, whole: Unmodified) -> LibraryConfig:
        """What a forward pass shows of the model."""
        side, parameters = whole.image_size, [p for p in self.module.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), record_attention() as record:
            torch.manual_seed(0)
            record.one_pass = True
            pixels = torch.randn(2, 3, side, side, requires_grad=True)
            feature = self.features(self.module, pixels)
            check_tensor("its feature", feature, [2, "D"])
            score = (feature @ torch.randn(feature.shape[1])).sum()  # the plain sum of a normalised feature is constant
        layers = select_layers(record, feature)
        if len(layers) != len(record.calls):
            raise UserError(f"{len(record.calls) - len(layers)} of its attention calls do not lead to the feature")
        known = getattr(self.module, "num_prefix_tokens", None)
        prefix, grid = count_prefix(layers[0], known if isinstance(known, int) else None)
        if grid is None or grid[0] != grid[1]:
            raise UserError(f"its tokens are no square grid of patches over {side} pixels, but {grid}")
        (read,) = torch.autograd.grad(score, pixels, retain_graph=True)
        covered = 1 + min(int(read.sum(axes).nonzero().max()) for axes in ((0, 1, 2), (0, 1, 3)))
        if covered < side or side % grid[0]:
            near = str(covered) if covered < side else "a multiple of its patch"
            raise UserError(f"image_size={side} does not divide into its {grid[0]} × {grid[0]} patches: take {near}")
        if record.mixed:
            print(
                f"note: {name} has convolutions between its attention layers, too: what they carry from patch to patch "
                "is not in its map",
                file=sys.stderr,
            )
        readout = known_readout(self.module)
        edges = [call.edge for call in layers if call.edge is not None]
        start = start_weights(layers[-1], torch.autograd.grad(score, edges[-1:], retain_graph=True)[0], prefix, readout)
        for parameter, grad in zip(parameters, torch.autograd.grad(score, parameters, allow_unused=True), strict=True):
            parameter.requires_grad_(grad is not None)
        return LibraryConfig(
            name,
            side,
            side // grid[0],
            whole.mean,
            whole.std,
            len(layers) - (readout == "attention"),
            feature.shape[1],
            prefix,
            record.mixed,
            "attention" if readout == "attention" else tuple(start.tolist()),
        )

    def train(self, mode: bool = True) -> LibraryBackbone:
        """The model itself stays in evaluation mode."""
        super().train(mode)
        self.module.eval()
        return self

    def rows(self, images: Tensor) -> Tensor:
        """Pixels ``[N, 3, S, S]`` float in [0, 1]."""
        side = self.config.image_size
        if images.dtype == torch.uint8:
            check_tensor("images", images, ["N", side, side, 3])
            images = images.permute(0, 3, 1, 2) / 255
        else:
            check_tensor("images", images, ["N", 3, side, side])
            check_pixels(images)
        return images.contiguous()  # strided otherwise, oneDNN's gradients may crash, and its sums differ

    def embed_rows(self, rows: Tensor) -> Tensor:
        """The same."""
        return rows

    def encode(
        self, tokens: Tensor, *, record: bool = False, visible: Tensor | None = None
    ) -> tuple[Tensor, list[Tap]]:
        """Pixels to features.

        Args:
            tokens: ``[N, 3, S, S]`` as `rows` gives them.
            record: Return the taps.
            visible: bool ``[N, T]``, the tokens that attention sees as keys; all by default.
        """
        pixels = (tokens - self.mean) / self.std
        if not record and visible is None:
            return self.features(self.module, pixels), []
        with record_attention() as seen:
            seen.visible = visible
            feature = self.features(self.module, pixels)
        return feature, [_tap(call) for call in seen.calls] if record else []

    def encode_filled(
        self, fill: Any, tokens: Tensor, mask: Tensor, donors: Tensor | None, dropped: int | None
    ) -> Tensor:
        """As `Backbone.encode_filled`: pixels are filled, and what is left out is hidden from attention.

        To a read-out that is a token before the patches, what no token attends to is not there.
        """
        if not fill.leaves_out:
            return self.encode(fill.pixels(tokens, mask, donors))[0]
        prefix, pool = self.config.prefix, self.config.pool
        if self.config.mixed or isinstance(pool, str) or any(pool[prefix:]):
            reads = "has convolutions between its tokens" if self.config.mixed else "reads its feature from all tokens"
            raise UserError(
                f"{self.config.name} {reads}, of which none can be left out while it is unmodified: take a strategy "
                "that fills them (single, multi)"
            )
        visible = torch.cat([mask.new_ones(len(mask), prefix), ~mask], dim=1)
        return self.encode(tokens, visible=visible)[0]


def _tap(call: Call) -> Tap:
    """A call as the layer's tap, but that the layer's input is not known."""
    times = call.q.shape[1] // call.k.shape[1]  # heads that share keys and values
    k, v = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (call.k, call.v))
    own = call.q.shape[-1] ** -0.5
    q = call.q if call.scale in (None, own) else call.q * (call.scale / own)
    return Tap(q, k, v, call.o, call.o)
