"""Architectures of other libraries' vision transformers, in this package's terms; what these cannot say is refused."""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import nn

from .layouts import State
from .vit import CLIP_MEAN, CLIP_STD, VisionTransformerConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_clip_config(visual: Any) -> VisionTransformerConfig:
    """The architecture of an open_clip vision tower."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    if not _is(visual, VisionTransformer):
        raise _unsupported(f"its vision tower is a {type(visual).__name__}, not open_clip's own VisionTransformer")
    block = visual.transformer.resblocks[0]
    if not _is(block, ResidualAttentionBlock):
        raise _unsupported(f"its blocks are {type(block).__name__}s, not plain pre-norm blocks")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise _unsupported("its feature is pooled from all tokens, not read at the class token")
    return VisionTransformerConfig(
        image_size=_square(visual.image_size),
        patch_size=_square(visual.patch_size),
        width=visual.class_embedding.shape[0],
        depth=len(visual.transformer.resblocks),
        heads=block.attn.num_heads,
        output_dim=None if visual.proj is None else visual.proj.shape[1],
        activation=_activation(block.mlp.gelu, QuickGELU),
        mean=_three(getattr(visual, "image_mean", None) or CLIP_MEAN),
        std=_three(getattr(visual, "image_std", None) or CLIP_STD),
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        layer_scale=not isinstance(block.ls_1, nn.Identity),
        mlp_width=_unusual(block.mlp.c_fc.out_features, block.mlp.c_fc.in_features),
        eps=visual.ln_post.eps,
    )


def timm_config(model: Any) -> VisionTransformerConfig:
    """The architecture of a timm vision transformer."""
    from timm.layers import Mlp, QuickGELU
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if not _is(model, VisionTransformer):
        raise _unsupported(f"it is a {type(model).__name__}, not timm's plain VisionTransformer")
    block = model.blocks[0]
    if not (_is(block, Block) and _is(block.attn, Attention) and _is(block.mlp, Mlp)):
        raise _unsupported("its blocks are not timm's plain pre-norm blocks")
    if model.num_reg_tokens:
        raise _unsupported(f"it has {model.num_reg_tokens} register tokens")
    if model.global_pool != "token":
        raise _unsupported(f"its feature is pooled by {model.global_pool!r}, not read at the class token")
    if model.no_embed_class or model.pos_embed is None:
        raise _unsupported("its class token has no position embedding")
    if block.attn.qkv.bias is None:
        raise _unsupported("its attention has no bias")
    if not isinstance(model.norm, nn.LayerNorm):
        raise _unsupported("it has no LayerNorm after its last block")
    data = model.pretrained_cfg
    notes = data.get("notes") or ()
    activation = _activation(block.mlp.act, QuickGELU)
    if activation == "gelu" and any("natively QuickGELU" in note for note in notes):
        instead = str(data.get("architecture")).replace("_clip_", "_clip_quickgelu_")
        print(f"note: these weights were trained with QuickGELU, which timm has as {instead}", file=sys.stderr)
    head = model.head
    # CLIP's projection is kept in the head, with a bias of zero.
    projects = not isinstance(model.norm_pre, nn.Identity) and isinstance(head, nn.Linear) and not bool(head.bias.any())
    return VisionTransformerConfig(
        image_size=_square(model.patch_embed.img_size),
        patch_size=_square(model.patch_embed.patch_size),
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        output_dim=head.out_features if projects else None,
        activation=activation,
        mean=_three(data["mean"]),
        std=_three(data["std"]),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        patch_bias=model.patch_embed.proj.bias is not None,
        layer_scale=not isinstance(block.ls1, nn.Identity),
        mlp_width=_unusual(block.mlp.fc1.out_features, model.embed_dim),
        eps=model.norm.eps,
    )


def hugging_face_config(settings: Any, state: State, pixels: dict[str, Any]) -> VisionTransformerConfig:
    """The architecture that a Hugging Face configuration, its weights and its preprocessor's settings describe."""
    kind = settings.model_type
    reasons = {
        "siglip": "its feature is pooled by attention",
        "siglip2": "its feature is pooled by attention",
        "dinov2_with_registers": "it has register tokens",
        "dinov3_vit": "it has register tokens and rotary positions",
    }
    if kind not in ("clip", "clip_vision_model", "vit", "dinov2"):
        reason = reasons.get(kind.removesuffix("_vision_model"), f"{kind} is neither CLIP, ViT nor DINOv2")
        raise _unsupported(reason)
    vision = settings.vision_config if kind == "clip" else settings
    clip = kind.startswith("clip")
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise _unsupported(f"its activation is {vision.hidden_act}")
    if getattr(vision, "use_swiglu_ffn", False):
        raise _unsupported("its MLPs are SwiGLU")
    if not getattr(vision, "qkv_bias", True):
        raise _unsupported("its attention has no bias")
    usual = (CLIP_MEAN, CLIP_STD) if clip else ((0.5,) * 3,) * 2 if kind == "vit" else (IMAGENET_MEAN, IMAGENET_STD)
    hidden = int(vision.hidden_size * vision.mlp_ratio) if kind == "dinov2" else vision.intermediate_size
    projection = state.get("visual_projection.weight")
    return VisionTransformerConfig(
        image_size=_square(vision.image_size),
        patch_size=_square(vision.patch_size),
        width=vision.hidden_size,
        depth=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        output_dim=None if projection is None else projection.shape[0],
        activation=vision.hidden_act,
        mean=_three(pixels.get("image_mean") or usual[0]),
        std=_three(pixels.get("image_std") or usual[1]),
        pre_norm=clip,
        patch_bias=not clip,
        layer_scale=kind == "dinov2",
        mlp_width=_unusual(hidden, vision.hidden_size),
        eps=vision.layer_norm_eps,
    )


def _is(module: Any, kind: type) -> bool:
    """Of this very class: a subclass may compute something else."""
    return type(module) is kind


def _activation(module: nn.Module, quick: type) -> Literal["quick_gelu", "gelu"]:
    if isinstance(module, quick):
        return "quick_gelu"
    if type(module).__name__ == "GELU" and getattr(module, "approximate", "none") == "none":
        return "gelu"
    raise _unsupported(f"its activation is {module}")


def _unusual(hidden: int, width: int) -> int | None:
    """An MLP's hidden dimension, where it is not the usual one."""
    return None if hidden == 4 * width else hidden


def _square(size: Any) -> int:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[1]:
        raise _unsupported(f"its images or patches are not square: {sides[0]}×{sides[1]}")
    return int(sides[0])


def _three(values: Any) -> tuple[float, float, float]:
    if len(values) != 3:
        raise _unsupported(f"its images have {len(values)} channels")
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _unsupported(reason: str) -> ValueError:
    return ValueError(f"this model is not supported because {reason}")
