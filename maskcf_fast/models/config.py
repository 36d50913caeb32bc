"""What a vision transformer is like, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..core.errors import UserError
from ..core.names import unknown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]

# Far beyond any model, and few enough to build: what a file asks for is bounded before anything is made.
LARGEST = {
    "image_size": 2**14,
    "patch_size": 2**10,
    "width": 2**16,
    "depth": 1000,
    "heads": 2**10,
    "output_dim": 2**16,
    "mlp_width": 2**19,
}


@dataclass(frozen=True)
class VisionTransformerConfig:
    """Architecture of a `VisionTransformer`.

    Attributes:
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels; divides ``image_size``.
        width: Embedding dimension; a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads per block.
        output_dim: Dimension of the feature after the projection; None leaves the projection out.
        activation: ``"quick_gelu"`` (OpenAI's weights), ``"gelu"``, or its approximation ``"gelu_tanh"``.
        mean: Per-channel mean that the input is normalised with.
        std: Per-channel standard deviation.
        pre_norm: LayerNorm on the tokens before the first block (CLIP); plain ViTs have none.
        patch_bias: Bias in the patch embedding; CLIP has none.
        layer_scale: A learned scale per channel at the end of both residual branches (DINOv2, CaiT).
        mlp_width: Hidden dimension of the blocks' MLPs; by default four times ``width``.
        eps: What LayerNorms add to the variance.
        pool: Where the feature is read: at the ``"class"`` token, or by an ``"attention"`` pool over the patches,
            without a class token (SigLIP).
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    output_dim: int | None = 512
    activation: Activation = "quick_gelu"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pre_norm: bool = True
    patch_bias: bool = False
    layer_scale: bool = False
    mlp_width: int | None = None
    eps: float = 1e-5
    pool: Literal["class", "attention"] = "class"

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            size = getattr(self, name)
            if size is None and name in ("output_dim", "mlp_width"):
                continue
            if type(size) is not int:
                raise TypeError(f"{name} must be an int, got {size!r}")
            if not 1 <= size <= most:
                raise UserError(f"{name} must be at {'least 1' if size < 1 else f'most {most}'}, got {size}")
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            near = f"{below} or {below + self.patch_size}" if below else self.patch_size
            raise UserError(
                f"image_size={self.image_size} does not divide by patch_size={self.patch_size}: take {near}"
            )
        if self.width % self.heads:
            raise UserError(f"width={self.width} does not divide into heads={self.heads}")
        for name, known in (("activation", get_args(Activation)), ("pool", ("class", "attention"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if not self.eps > 0:
            raise UserError(f"eps must be positive, got {self.eps}")

    @property
    def num_patches(self) -> int:
        """Patches per image, ``L``."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def feature_dim(self) -> int:
        """Dimension of the feature, ``D``."""
        return self.width if self.output_dim is None else self.output_dim

    def resized(self, image_size: int | None) -> VisionTransformerConfig:
        """The same for other images; for its own where the size is None."""
        return self if image_size is None else replace(self, image_size=image_size)

    @property
    def matrix_parameters(self) -> int:
        """Numbers in the weights of the blocks and the patch embedding: nearly all of the model."""
        hidden = self.mlp_width or 4 * self.width
        block = self.width * (4 * self.width + 2 * hidden)
        return self.depth * block + 3 * self.width * self.patch_size**2


PRESETS = {
    "ViT-B/32": VisionTransformerConfig(),
    "ViT-B/16": VisionTransformerConfig(patch_size=16),
    "ViT-L/14": VisionTransformerConfig(patch_size=14, width=1024, depth=24, heads=16, output_dim=768),
    "ViT-L/14@336": VisionTransformerConfig(
        image_size=336, patch_size=14, width=1024, depth=24, heads=16, output_dim=768
    ),
    "SigLIP-B/16": VisionTransformerConfig(
        patch_size=16,
        output_dim=None,
        activation="gelu_tanh",
        mean=HALF,
        std=HALF,
        pre_norm=False,
        patch_bias=True,
        eps=1e-6,
        pool="attention",
    ),
    "tiny": VisionTransformerConfig(32, 8, 96, 4, 4, 64, "gelu", HALF, (0.25, 0.25, 0.25)),
}


def preset(name: str, **changes: object) -> VisionTransformerConfig:
    """The architecture of a preset, with ``changes`` to its fields.

    Raises:
        ValueError: Unknown preset (the nearest is suggested).
    """
    if name not in PRESETS:
        raise unknown("model preset", name, PRESETS)
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
