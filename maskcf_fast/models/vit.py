"""A compact CLIP vision transformer, split where counterfactual masking needs it.

``embed`` turns pixels into tokens, each patch alone; ``encode`` turns tokens into a feature. Between the two,
patches can be refilled or dropped without embedding them again.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import check_tensor
from .._precision import compute_dtype, no_autocast
from ..ops.drop import Packing
from ..ops.patchify import patchify

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
        activation: ``"quick_gelu"`` (OpenAI's weights) or ``"gelu"``.
        mean: Per-channel mean that the input is normalised with.
        std: Per-channel standard deviation.
        pre_norm: LayerNorm on the tokens before the first block (CLIP); plain ViTs have none.
        patch_bias: Bias in the patch embedding; CLIP has none.
        layer_scale: A learned scale per channel at the end of both residual branches (DINOv2, CaiT).
        mlp_width: Hidden dimension of the blocks' MLPs; by default four times ``width``.
        eps: What LayerNorms add to the variance.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    output_dim: int | None = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pre_norm: bool = True
    patch_bias: bool = False
    layer_scale: bool = False
    mlp_width: int | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} does not divide by patch_size={self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation must be 'quick_gelu' or 'gelu', got {self.activation!r}")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise ValueError(f"mlp_width must be at least 1, got {self.mlp_width}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")

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
    "tiny": VisionTransformerConfig(32, 8, 96, 4, 4, 64, "gelu", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Tap(NamedTuple):
    """What one layer's attention consumed and produced; ``Tq`` is T, or 1 in the last layer."""

    q: Tensor  # [N, H, Tq, d]
    k: Tensor  # [N, H, T, d]
    v: Tensor  # [N, H, T, d]
    o: Tensor  # [N, H, Tq, d], before the output projection
    x: Tensor  # [N, T, D], the layer's normalised input


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Fused attention."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # There, forward and backward passes in float32 take 0.45 (50 tokens) to 0.88 (257 tokens) of the time.
        with no_autocast(q.device):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Self-attention with packed query, key and value projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cls_only: bool, packing: Packing | None) -> tuple[Tensor, Tap]:
        """``x [N, T, D]`` → ``[N, Tq, D]`` and the tap; packed, ``[M, D]`` → ``[M, D]`` or ``[N, 1, D]``."""
        pad = (lambda t: t) if packing is None else packing.pad
        if cls_only:  # only the class token asks; all tokens answer
            width = x.shape[-1]
            q = F.linear(class_tokens(x, packing), self.qkv.weight[:width], self.qkv.bias[:width])
            k, v = pad(F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])).chunk(2, dim=-1)
        else:
            q, k, v = pad(self.qkv(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        o = attend(q, k, v, None if packing is None else packing.visible[:, None, None, :])
        joined = o.transpose(1, 2).flatten(2)
        return self.out(joined if packing is None or cls_only else packing.pack(joined)), Tap(q, k, v, o, x)


def class_tokens(x: Tensor, packing: Packing | None) -> Tensor:
    """``[N, 1, D]`` of a batch's tokens."""
    return x[:, :1] if packing is None else x.index_select(0, packing.rows[:, 0])[:, None]


# What lies between the matrix products. Compiled (`VisionTransformer.compile_pointwise`), each is one kernel; a
# LayerNorm takes its statistics in float32 and gives the dtype that came in.


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + y``, and its LayerNorm."""
    x = x + y
    return x, norm(x, weight, bias, eps)


def activate(hidden: Tensor, quick: bool) -> Tensor:
    """GELU, or OpenAI's quick approximation of it."""
    return hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)


POINTWISE: tuple[Callable[..., Any], ...] = (norm, add_norm, activate)


def scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """A residual branch, times its scale if it has one."""
    return branch if scale is None else branch * scale.to(branch.dtype)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width or 4 * config.width
        self.ln_1 = nn.LayerNorm(width, config.eps)
        self.attn = Attention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width, config.eps)
        self.fc = nn.Linear(width, hidden)
        self.proj = nn.Linear(hidden, width)
        self.scale_1, self.scale_2 = (
            nn.Parameter(torch.full((width,), 0.1)) if config.layer_scale else None for _ in range(2)
        )
        self.quick = config.activation == "quick_gelu"
        self.pointwise = POINTWISE

    def forward(self, x: Tensor, cls_only: bool = False, packing: Packing | None = None) -> tuple[Tensor, Tap]:
        """``x [N, T, D]`` → ``[N, Tq, D]`` (the class token alone if ``cls_only``) and the tap; packed, as there."""
        norm, add_norm, activate = self.pointwise
        first, second = self.ln_1, self.ln_2
        attended, tap = self.attn(norm(x, first.weight, first.bias, first.eps), cls_only, packing)
        attended = scaled(attended, self.scale_1)
        x = class_tokens(x, packing) if cls_only else x
        x, normed = add_norm(x, attended, second.weight, second.bias, second.eps)
        return x + scaled(self.proj(activate(self.fc(normed), self.quick)), self.scale_2), tap


class VisionTransformer(nn.Module):
    """CLIP's vision transformer, or a plain one: image → feature of the class token, not L2-normalised.

    Args:
        config: A `VisionTransformerConfig` or the name of a preset ("ViT-B/32", "ViT-B/16", "ViT-L/14",
            "ViT-L/14@336", "tiny").

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
        self.class_embedding = nn.Parameter(torch.randn(width) * scale)
        self.position_embedding = nn.Parameter(torch.randn(1 + config.num_patches, width) * scale)
        self.ln_pre = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_post = nn.LayerNorm(width, config.eps)
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
            Tokens ``[N, 1 + L, width]``, class token first.

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
        cls_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return self.ln_pre(torch.cat([cls_token, patches], dim=1) + self.position_embedding).to(patches.dtype)

    def encode(
        self, tokens: Tensor, *, packing: Packing | None = None, record: bool = False
    ) -> tuple[Tensor, list[Tap]]:
        """Tokens to the class token's feature. In the last block only the class token is computed.

        Args:
            tokens: ``[N, T, width]``, class token first; any number of patches may have been left out. With
                ``packing``, rows ``[M, width]``.
            packing: Where the rows belong (`pack_tokens`).
            record: Whether to return the taps, for tokens that are not packed.

        Returns:
            The feature ``[N, D]``, and each layer's `Tap` (references to what attention computed anyway), or none.
        """
        taps = []
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            inputs = (tokens, layer == last, packing)
            keep_all = not (self.recompute and torch.is_grad_enabled())
            tokens, tap = block(*inputs) if keep_all else checkpoint(block, *inputs, use_reentrant=False)
            if record:
                taps.append(tap)
            del tap  # else a layer's keys and values live on through the next
        feature = self.ln_post(tokens[:, 0])
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
        for block in cast(list[Block], self.blocks):
            block.pointwise = tuple(functions)

    def forward(self, images: Tensor) -> Tensor:
        """Images (as `embed` takes them) to features ``[N, D]``."""
        return self.encode(self.embed(images))[0]


def preset(name: str, **changes: object) -> VisionTransformerConfig:
    """The architecture of a preset, with ``changes`` to its fields.

    Raises:
        ValueError: Unknown preset (the nearest is suggested).
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model preset {name!r} (there are {', '.join(PRESETS)}){hint}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
