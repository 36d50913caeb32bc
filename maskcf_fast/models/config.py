"""What a vision transformer is like, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from ..core.errors import UserError
from ..core.names import unknown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
Pool = Literal["class", "mean", "attention"]
Positions = Literal["all", "patches", "none"]
QkvBias = Literal["qkv", "qv", "none"]

# Far beyond any model, and few enough to build: what a file asks for is bounded before anything is made.
LARGEST = {
    "image_size": 2**14,
    "patch_size": 2**10,
    "width": 2**16,
    "depth": 1000,
    "heads": 2**10,
    "output_dim": 2**16,
    "mlp_width": 2**19,
    "registers": 1000,
    "pool_heads": 2**10,
    "pool_mlp_width": 2**19,
}
OPTIONAL = ("output_dim", "mlp_width", "pool_heads", "pool_mlp_width")  # None has a meaning


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings of the patches: half of the frequencies turn with the row, half with the column.

    Frequency ``i`` of ``d / 4`` turns by ``coordinate * theta ** (-4 i / d)``.

    Attributes:
        theta: Base of the frequencies.
        coordinates: ``"index"`` counts patches from ``offset`` on; ``"centred"`` runs from -2π to 2π over the image,
            at the patches' centres (DINOv3).
        offset: Of the first patch, for ``"index"``.
        grid: Patches on a side that the index is scaled to, whatever the image's size; None leaves it.
        columns_first: The column's frequencies come before the row's.
        halves: Channel ``c`` turns with ``c + d / 2``, not with its neighbour.
    """

    theta: float = 10000.0
    coordinates: Literal["index", "centred"] = "index"
    offset: float = 0.0
    grid: int | None = None
    columns_first: bool = False
    halves: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.theta < float("inf"):
            raise UserError(f"the base of rotary positions must be positive and finite, got theta={self.theta}")
        if self.coordinates not in ("index", "centred"):
            raise UserError(f"coordinates must be 'index' or 'centred', got {self.coordinates!r}")


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
        activation: ``"quick_gelu"`` (OpenAI's weights), ``"gelu"``, its approximation ``"gelu_tanh"``, or ``"silu"``.
        mean: Per-channel mean that the input is normalised with.
        std: Per-channel standard deviation.
        pre_norm: LayerNorm on the tokens before the first block (CLIP); plain ViTs have none.
        patch_bias: Bias in the patch embedding; CLIP has none.
        layer_scale: A learned scale per channel at the end of both residual branches (DINOv2, CaiT).
        mlp_width: Hidden dimension of the blocks' MLPs; by default four times ``width``.
        eps: What LayerNorms add to the variance.
        pool: Where the feature is read: at the ``"class"`` token, from the ``"mean"`` of the patches, or by an
            ``"attention"`` pool over all tokens (SigLIP).
        class_token: A learned token before the patches.
        registers: Learned tokens between it and the patches, of which nothing is read (DINOv2, DINOv3).
        positions: Which tokens have a learned position: ``"all"`` is the class token and the patches.
        rotary: Rotary positions of the patches, beside or instead of learned ones.
        qkv_bias: Bias of queries, keys and values, of two of them, or of none.
        qk_norm: LayerNorm on each head's queries and keys.
        attention_norm: LayerNorm before attention's output projection (EVA-02-CLIP).
        gated_mlp: The MLP's first layer makes gates, too: ``activation(gate) * value`` (SwiGLU).
        mlp_norm: LayerNorm before the MLP's second layer (EVA-02).
        pool_norm: With a ``"mean"``, whether the last LayerNorm acts on the mean, not on the tokens before.
        pool_heads: Heads of the attention pool, where they are not as many as the blocks'.
        pool_mlp_width: Hidden dimension of its MLP, where it is not the blocks'.
        projection_bias: Bias in the projection (EVA-02-CLIP).
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
    pool: Pool = "class"
    class_token: bool = True
    registers: int = 0
    positions: Positions = "all"
    rotary: Rotary | None = None
    qkv_bias: QkvBias = "qkv"
    qk_norm: bool = False
    attention_norm: bool = False
    gated_mlp: bool = False
    mlp_norm: bool = False
    pool_norm: bool = False
    pool_heads: int | None = None
    pool_mlp_width: int | None = None
    projection_bias: bool = False
    native: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            size = getattr(self, name)
            if size is None and name in OPTIONAL:
                continue
            if type(size) is not int:
                raise TypeError(f"{name} must be an int, got {size!r}")
            least = 0 if name == "registers" else 1
            if not least <= size <= most:
                raise UserError(f"{name} must be at {f'least {least}' if size < least else f'most {most}'}, got {size}")
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            near = f"{below} or {below + self.patch_size}" if below else self.patch_size
            raise UserError(
                f"image_size={self.image_size} does not divide by patch_size={self.patch_size}: take {near}"
            )
        for heads in (self.heads, self.pool_heads or 1):
            if self.width % heads:
                raise UserError(f"width={self.width} does not divide into heads={heads}")
        choices = {"activation": Activation, "pool": Pool, "positions": Positions, "qkv_bias": QkvBias}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                known = " or ".join(map(repr, get_args(kind)))
                raise UserError(f"{name} must be {known}, got {getattr(self, name)!r}")
        if self.pool == "class" and not self.class_token:
            raise UserError('pool="class" reads the class token: without one, take "mean" or "attention"')
        if self.rotary is not None and self.width // self.heads % 4:
            raise UserError(f"rotary positions need heads of a multiple of 4, got {self.width // self.heads} channels")
        if not self.eps > 0:
            raise UserError(f"eps must be positive, got {self.eps}")

    @property
    def num_patches(self) -> int:
        """Patches per image, ``L``."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.class_token + self.registers

    @property
    def prefix_positions(self) -> int:
        """Tokens before the patches that have a learned position: the class token, or none."""
        return int(self.class_token and self.positions == "all")

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
        block = self.width * (4 * self.width + (3 if self.gated_mlp else 2) * hidden)
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
        class_token=False,
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
