"""A compact CLIP vision transformer, split where counterfactual masking needs it.

``embed`` turns pixels into tokens, each patch alone; ``encode`` turns tokens into a feature. Between the two,
patches can be refilled or dropped without embedding them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.checks import check_tensor
from ..core.errors import UserError
from ..core.names import unknown
from ..core.precision import compute_dtype
from ..ops.drop import Packing
from ..ops.patchify import patchify
from .blocks import POINTWISE, Block, Tap, class_tokens
from .pool import AttentionPool, without_probe

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


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
        for name in ("image_size", "patch_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size={self.image_size} does not divide by patch_size={self.patch_size}")
        if self.width % self.heads:
            raise UserError(f"width={self.width} does not divide into heads={self.heads}")
        for name, known in (("activation", get_args(Activation)), ("pool", ("class", "attention"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise UserError(f"mlp_width must be at least 1, got {self.mlp_width}")
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


# A block draws no random numbers: there is no state of a generator to keep, which a CUDA graph could not.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class VisionTransformer(nn.Module):
    """CLIP's vision transformer, SigLIP's, or a plain one: image → feature, not L2-normalised.

    Args:
        config: A `VisionTransformerConfig` or the name of a preset ("ViT-B/32", "ViT-B/16", "ViT-L/14",
            "ViT-L/14@336", "SigLIP-B/16", "tiny").

    Raises:
        ValueError: Unknown preset (the nearest is suggested).
    """

    def __init__(self, config: VisionTransformerConfig | str) -> None:
        super().__init__()
        self.config = config = preset(config) if isinstance(config, str) else config
        width, scale = config.width, config.width**-0.5
        patch_shape = (width, 3, config.patch_size, config.patch_size)
        self.patch_weight = nn.Parameter(torch.randn(patch_shape) * (3 * config.patch_size**2) ** -0.5)
        self.patch_bias = nn.Parameter(torch.zeros(width)) if config.patch_bias else None
        pooled = config.pool == "attention"
        self.class_embedding = None if pooled else nn.Parameter(torch.randn(width) * scale)
        positions = config.num_patches + (not pooled)  # the pool's probe has none
        self.position_embedding = nn.Parameter(torch.randn(positions, width) * scale)
        self.ln_pre = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_post = nn.LayerNorm(width, config.eps)
        self.pool = AttentionPool(config) if pooled else None
        self.projection = (
            None if config.output_dim is None else nn.Parameter(torch.randn(width, config.output_dim) * scale)
        )
        self.recompute = False  # activation checkpointing: keep each block's input, recompute the rest
        self._init_blocks()

    def _init_blocks(self) -> None:
        """CLIP's initialisation: residual branches shrink with the depth."""
        width, depth = self.config.width, self.config.depth
        for block in cast(list[Block], self.blocks):
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.out.weight, std=(2 * depth * width) ** -0.5)
            nn.init.normal_(block.fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.proj.weight, std=(2 * depth * width) ** -0.5)
            for linear in (block.attn.qkv, block.attn.out, block.fc, block.proj):
                nn.init.zeros_(linear.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Pixels to tokens, every patch alone: normalise, embed, add the position, first LayerNorm.

        Args:
            images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1], not normalised.

        Returns:
            Tokens ``[N, 1 + L, width]``, class token first, or in its place the attention pool's probe.

        Raises:
            ValueError: ``S`` is not the model's ``image_size``.
        """
        return self.embed_rows(self.rows(images))

    def rows(self, images: Tensor) -> Tensor:
        """The first part of `embed`, which has no parameters: normalised patches ``[N, L, 3 * P * P]``."""
        config = self.config
        side = config.image_size
        if images.dtype == torch.uint8:
            check_tensor("images", images, ["N", side, side, 3])
        else:
            check_tensor("images", images, ["N", 3, side, side])
        dtype = compute_dtype(self.patch_weight)
        return patchify(images, config.patch_size, mean=config.mean, std=config.std, dtype=dtype)

    def embed_rows(self, rows: Tensor) -> Tensor:
        """The rest of `embed`."""
        patches = F.linear(rows, self.patch_weight.flatten(1), self.patch_bias)
        first = cast(Tensor, self.class_embedding) if self.pool is None else self.pool.probe
        first = first.to(patches.dtype).expand(patches.shape[0], 1, -1)
        if self.pool is not None:
            return torch.cat([first, self.ln_pre(patches + self.position_embedding).to(patches.dtype)], dim=1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.position_embedding).to(patches.dtype)

    def encode(
        self, tokens: Tensor, *, packing: Packing | None = None, record: bool = False
    ) -> tuple[Tensor, list[Tap]]:
        """Tokens to the feature. Where it is the class token's, the last block computes that alone.

        Args:
            tokens: ``[N, T, width]``, class token or probe first; any number of patches may have been left out. With
                ``packing``, rows ``[M, width]``.
            packing: Where the rows belong (`pack_tokens`).
            record: Whether to return the taps, for tokens that are not packed.

        Returns:
            The feature ``[N, D]``, and each layer's `Tap` (references to what attention computed anyway), the
            attention pool's `PoolTap` last, or none.
        """
        taps: list[Tap] = []
        last = len(self.blocks) - 1
        if self.pool is not None:  # the pool reads all patches
            last = -1
            probe = class_tokens(tokens, packing)
            tokens, packing = without_probe(tokens, packing)
        for layer, block in enumerate(self.blocks):
            inputs = (tokens, layer == last, packing)
            keep_all = not (self.recompute and torch.is_grad_enabled())
            tokens, tap = block(*inputs) if keep_all else recomputed(block, *inputs)
            if record:
                taps.append(tap)
            del tap  # else a layer's keys and values live on through the next
        if self.pool is None:
            feature = self.ln_post(tokens[:, 0])
        else:
            feature, pool_tap = self.pool(self.ln_post(tokens).to(tokens.dtype), probe, packing)
            if record:
                taps.append(pool_tap)
        return feature if self.projection is None else feature @ self.projection, taps

    def compile_pointwise(self, enabled: bool = True) -> None:
        """Compile what lies between the matrix products into one kernel each (or undo it).

        The products stay with the vendor's library, which a compiled block would call as well. And a compiled
        block's backward pass always forms the weights' gradients, of which a relevance map needs none.
        """
        if enabled:
            import torch._dynamo.config
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False  # the map's backward pass keeps the graph for the task's
            # With and without gradients, one image or many, one token or many, each dtype: more than the default 8.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        functions = [torch.compile(f, fullgraph=True) for f in POINTWISE] if enabled else POINTWISE
        for module in self.modules():
            if isinstance(module, Block | AttentionPool):
                module.pointwise = tuple(functions)

    def forward(self, images: Tensor) -> Tensor:
        """Images (as `embed` takes them) to features ``[N, D]``."""
        return self.encode(self.embed(images))[0]


def preset(name: str, **changes: object) -> VisionTransformerConfig:
    """The architecture of a preset, with ``changes`` to its fields.

    Raises:
        ValueError: Unknown preset (the nearest is suggested).
    """
    if name not in PRESETS:
        raise unknown("model preset", name, PRESETS)
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
