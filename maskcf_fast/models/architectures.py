"""Architectures of other libraries' vision transformers, in this package's terms; what these cannot say is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import nn

from .config import CLIP_MEAN, CLIP_STD, HALF, Activation, VisionTransformerConfig
from .layouts import State

HF_ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_clip_config(visual: Any) -> VisionTransformerConfig:
    """The architecture of an open_clip vision tower: its own, or the timm one of its SigLIPs."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    mean = _three(getattr(visual, "image_mean", None) or CLIP_MEAN)
    std = _three(getattr(visual, "image_std", None) or CLIP_STD)
    if _is(visual, TimmModel):
        if len(visual.head):
            raise _unsupported(
                f"its vision tower has a head of its own: {', '.join(dict(visual.head.named_children()))}"
            )
        return replace(timm_config(visual.trunk), mean=mean, std=std)
    if not _is(visual, VisionTransformer):
        raise _unsupported(
            f"its vision tower is a {type(visual).__name__}, not a VisionTransformer of open_clip or timm"
        )
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
        mean=mean,
        std=std,
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
    pooled = model.global_pool == "map"
    if pooled:
        _check_timm_pool(model)
    elif model.global_pool != "token":
        raise _unsupported(f"its feature is pooled by {model.global_pool!r}, not at the class token or by attention")
    if model.pos_embed is None or (model.no_embed_class and not pooled):
        raise _unsupported(f"its {'patches have' if pooled else 'class token has'} no position embedding")
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
    patch_size = _square(model.patch_embed.patch_size)
    return VisionTransformerConfig(
        image_size=_whole_patches(_square(model.patch_embed.img_size), patch_size),
        patch_size=patch_size,
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
        pool="attention" if pooled else "class",
    )


def _check_timm_pool(model: Any) -> None:
    """Raise unless the pool is SigLIP's: one probe, and an MLP like the blocks'."""
    from timm.layers import Mlp
    from timm.layers.attention_pool import AttentionPoolLatent

    pool, block = model.attn_pool, model.blocks[0]
    if model.has_class_token:
        raise _unsupported("its attention pool leaves out a class token that the patches see")
    plain = (
        _is(pool, AttentionPoolLatent)
        and _is(pool.q, nn.Linear)
        and pool.q.bias is not None
        and pool.pos_embed is None
        and isinstance(pool.k_norm, nn.Identity)
        and _is(pool.mlp, Mlp)
    )
    if not plain:
        raise _unsupported("its attention pool is not SigLIP's")
    ours = (1, block.attn.num_heads, block.mlp.fc1.out_features, model.embed_dim)
    theirs = (pool.latent_len, pool.num_heads, pool.mlp.fc1.out_features, pool.latent_dim)
    if theirs != ours:
        raise _unsupported(
            f"probes, heads, MLP and width of its attention pool are {theirs}, not {ours} as its blocks'"
        )


def hugging_face_config(settings: Any, state: State, pixels: dict[str, Any]) -> VisionTransformerConfig:
    """The architecture that a Hugging Face configuration, its weights and its preprocessor's settings describe."""
    kind = settings.model_type.removesuffix("_vision_model")
    reasons = {
        "siglip2": "its images are of any shape (NaFlex); SigLIP 2 of a fixed resolution is supported",
        "dinov2_with_registers": "it has register tokens",
        "dinov3_vit": "it has register tokens and rotary positions",
    }
    if kind not in ("clip", "siglip", "vit", "dinov2"):
        raise _unsupported(reasons.get(kind, f"{kind} is neither CLIP, SigLIP, ViT nor DINOv2"))
    vision = getattr(settings, "vision_config", settings)
    if vision.hidden_act not in HF_ACTIVATIONS:
        raise _unsupported(f"its activation is {vision.hidden_act}")
    if getattr(vision, "use_swiglu_ffn", False):
        raise _unsupported("its MLPs are SwiGLU")
    if not getattr(vision, "qkv_bias", True):
        raise _unsupported("its attention has no bias")
    if not getattr(vision, "vision_use_head", True):
        raise _unsupported("its attention pool is left out (vision_use_head)")
    mean, std = {"clip": (CLIP_MEAN, CLIP_STD), "dinov2": (IMAGENET_MEAN, IMAGENET_STD)}.get(kind, (HALF, HALF))
    hidden = int(vision.hidden_size * vision.mlp_ratio) if kind == "dinov2" else vision.intermediate_size
    patch_size = _square(vision.patch_size)
    projection = state.get("visual_projection.weight")
    return VisionTransformerConfig(
        image_size=_whole_patches(_square(vision.image_size), patch_size),
        patch_size=patch_size,
        width=vision.hidden_size,
        depth=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        output_dim=None if projection is None else projection.shape[0],
        activation=HF_ACTIVATIONS[vision.hidden_act],
        mean=_three(pixels.get("image_mean") or mean),
        std=_three(pixels.get("image_std") or std),
        pre_norm=kind == "clip",
        patch_bias=kind != "clip",
        layer_scale=kind == "dinov2",
        mlp_width=_unusual(hidden, vision.hidden_size),
        eps=vision.layer_norm_eps,
        pool="attention" if kind == "siglip" else "class",
    )


def _is(module: Any, kind: type) -> bool:
    """Of this very class: a subclass may compute something else."""
    return type(module) is kind


def _activation(module: nn.Module, quick: type) -> Activation:
    if isinstance(module, quick):
        return "quick_gelu"
    if type(module).__name__ == "GELUTanh":
        return "gelu_tanh"
    if type(module).__name__ == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_tanh"
    raise _unsupported(f"its activation is {module}")


def _unusual(hidden: int, width: int) -> int | None:
    """An MLP's hidden dimension, where it is not the usual one."""
    return None if hidden == 4 * width else hidden


def _square(size: Any) -> int:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[1]:
        raise _unsupported(f"its images or patches are not square: {sides[0]}×{sides[1]}")
    return int(sides[0])


def _whole_patches(side: int, patch: int) -> int:
    """The side of the square that is made of whole patches: all that a convolution reads of the image."""
    whole = side // patch * patch
    if whole != side:
        print(
            f"note: this model's patches cover {whole} of {side} pixels; images of {whole} are what it gets",
            file=sys.stderr,
        )
    return whole


def _three(values: Any) -> tuple[float, float, float]:
    if len(values) != 3:
        raise _unsupported(f"its images have {len(values)} channels")
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _unsupported(reason: str) -> ValueError:
    return ValueError(f"this model is not supported because {reason}")
