"""timm's vision transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.names import did_you_mean
from ...core.tensors import save_tensors
from ..config import Activation, VisionTransformerConfig
from ..head import ImageClassifier, LinearClassifier
from ..naming import TIMM, State
from . import (
    PT,
    Classifier,
    check_settings,
    fits,
    is_exactly,
    loading,
    no_place,
    refuse_prompts,
    square,
    three,
    unsupported,
    unusual,
    whole_patches,
)

ARGUMENTS = {"image_size": "img_size", "patch_size": "patch_size", "width": "embed_dim", "depth": "depth",
             "heads": "num_heads"}  # fmt: skip
# The functions that make a model with these traits, whatever its sizes; {} is for QuickGELU.
ENTRIES = {
    "vit_base_patch16_siglip_224": {"pool": "attention", "pre_norm": False, "patch_bias": True, "eps": 1e-6},
    "vit_base_patch16_clip_{}224": {"pool": "class", "pre_norm": True, "patch_bias": False, "eps": 1e-5},
    "vit_base_patch16_224": {"pool": "class", "pre_norm": False, "patch_bias": True, "eps": 1e-6},
}


def load_module(name: str, pretrained: bool = True) -> Any:
    """The model that ``name`` stands for, in eval mode."""
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        stem = name.partition(".")[0]
        if not timm.is_model(name):
            raise UserError(f"timm has no model {name!r}{did_you_mean(stem, timm.list_models())}")
        if pretrained and not timm.is_model_pretrained(name):
            tags = timm.list_pretrained(f"{stem}.*")
            raise UserError(f"timm has no weights for {name!r}; there are {', '.join(tags) or 'none for this model'}")
    with loading(f"timm:{name}"):
        check_settings(name, "config.json")
        model = timm.create_model(name, pretrained=pretrained).eval()
    data = getattr(model, "pretrained_cfg", {})
    known = str(data.get("architecture"))
    quick = pretrained and any("natively QuickGELU" in note for note in data.get("notes") or ())
    if quick and "quickgelu" not in known:
        instead = known.replace("_clip_", "_clip_quickgelu_")
        print(f"note: these weights were trained with QuickGELU, which timm has as {instead}", file=sys.stderr)
    return model


def tower(name: str) -> tuple[VisionTransformerConfig, State]:
    """The architecture and the tensors of the whole model."""
    model = load_module(name)
    return vision_config(model), model.state_dict()


def classifier(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Classifier:
    """A classifier with its own preprocessing, and ImageNet's class names where there are 1000."""
    import timm

    refuse_prompts(prompts)
    model = load_module(name, pretrained).to(device)
    data = timm.data.resolve_model_data_config(model)
    classes: dict[int, str] = {}
    if model.num_classes == 1000:
        info = timm.data.ImageNetInfo()
        classes = {i: info.index_to_description(i) for i in range(1000)}
    transform = timm.data.create_transform(**data, is_training=False)
    return Classifier(model, model, transform, data["mean"], data["std"], classes)


def vision_config(model: Any) -> VisionTransformerConfig:
    """The architecture of a vision transformer."""
    from timm.layers import Mlp, QuickGELU
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if not is_exactly(model, VisionTransformer):
        raise unsupported(f"it is a {type(model).__name__}, not timm's plain VisionTransformer")
    block = model.blocks[0]
    if not (is_exactly(block, Block) and is_exactly(block.attn, Attention) and is_exactly(block.mlp, Mlp)):
        raise unsupported("its blocks are not timm's plain pre-norm blocks")
    if model.num_reg_tokens:
        raise unsupported(f"it has {model.num_reg_tokens} register tokens")
    pooled = model.global_pool == "map"
    if pooled:
        _check_pool(model)
    elif model.global_pool != "token":
        raise unsupported(f"its feature is pooled by {model.global_pool!r}, not at the class token or by attention")
    if model.pos_embed is None or (model.no_embed_class and not pooled):
        raise unsupported(f"its {'patches have' if pooled else 'class token has'} no position embedding")
    if block.attn.qkv.bias is None:
        raise unsupported("its attention has no bias")
    if not isinstance(model.norm, nn.LayerNorm):
        raise unsupported("it has no LayerNorm after its last block")
    data, head = model.pretrained_cfg, model.head
    pre_norm = not isinstance(model.norm_pre, nn.Identity)
    # CLIP's projection is kept in the head, with a bias of zero.
    projects = pre_norm and isinstance(head, nn.Linear) and not bool(head.bias.any())
    patch_size = square(model.patch_embed.patch_size)
    return VisionTransformerConfig(
        image_size=whole_patches(square(model.patch_embed.img_size), patch_size),
        patch_size=patch_size,
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        output_dim=head.out_features if projects else None,
        activation=activation(block.mlp.act, QuickGELU),
        mean=three(data["mean"]),
        std=three(data["std"]),
        pre_norm=pre_norm,
        patch_bias=model.patch_embed.proj.bias is not None,
        layer_scale=not isinstance(block.ls1, nn.Identity),
        mlp_width=unusual(block.mlp.fc1.out_features, model.embed_dim),
        eps=model.norm.eps,
        pool="attention" if pooled else "class",
    )


def _check_pool(model: Any) -> None:
    """Raise unless the pool is SigLIP's: one probe, and an MLP like the blocks'."""
    from timm.layers import Mlp
    from timm.layers.attention_pool import AttentionPoolLatent

    pool, block = model.attn_pool, model.blocks[0]
    if model.has_class_token:
        raise unsupported("its attention pool leaves out a class token that the patches see")
    plain = (
        is_exactly(pool, AttentionPoolLatent)
        and is_exactly(pool.q, nn.Linear)
        and pool.q.bias is not None
        and pool.pos_embed is None
        and isinstance(pool.k_norm, nn.Identity)
        and is_exactly(pool.mlp, Mlp)
    )
    if not plain:
        raise unsupported("its attention pool is not SigLIP's")
    ours = (1, block.attn.num_heads, block.mlp.fc1.out_features, model.embed_dim)
    theirs = (pool.latent_len, pool.num_heads, pool.mlp.fc1.out_features, pool.latent_dim)
    if theirs != ours:
        raise unsupported(f"probes, heads, MLP and width of its attention pool are {theirs}, not {ours} as its blocks'")


def activation(module: nn.Module, quick: type) -> Activation:
    """What a module of timm or open_clip computes; ``quick`` is the library's QuickGELU."""
    if isinstance(module, quick):
        return "quick_gelu"
    if type(module).__name__ == "GELUTanh":
        return "gelu_tanh"
    if type(module).__name__ == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_tanh"
    raise unsupported(f"its activation is {module}")


def write(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
    """Write ``config.json`` and ``model.safetensors``; arguments, result and errors as for Hugging Face.

    timm's head is a linear layer on the class token. A linear head on a projected feature is one too, once the two
    products are multiplied. A cosine head is none: then the projection takes that place, as in timm's own CLIPs.
    """
    config = model.backbone.config
    name = next((name for name, traits in ENTRIES.items() if fits(config, traits)), None)
    if name is None:
        raise no_place("timm", "SigLIP" if config.pool == "attention" else "ViT", config)
    quick = config.activation == "quick_gelu"
    state = dict(model.backbone.state_dict())
    projection = state.pop("projection", None)
    inside = isinstance(model.head, LinearClassifier)
    head = _head(model, projection, inside)
    args: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in ARGUMENTS.items()}
    if config.mlp_width:
        args["mlp_ratio"] = (config.mlp_width + 0.5) / config.width  # rounded down again
    if config.layer_scale:
        args["init_values"] = 1e-5
    if config.activation == "gelu_tanh" or (quick and "{}" not in name):
        args["act_layer"] = config.activation
    num_classes = head["head.weight"].shape[0] if head else 0
    settings = {
        "architecture": name.format("quickgelu_" if quick else ""),
        "num_classes": num_classes,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"label_names": list(classes)} if inside else {}),
        },
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    save_tensors(folder / "model.safetensors", {**TIMM.to_theirs(state), **head}, PT)
    return 'timm.create_model("local-dir:{out}", pretrained=True)', inside


def _head(model: ImageClassifier, projection: Tensor | None, linear: bool) -> dict[str, Tensor]:
    if linear:
        weight = model.head.weight.detach()
        weight = weight if projection is None else (weight.double() @ projection.mT.double()).float()
        return {"head.weight": weight.contiguous(), "head.bias": model.head.bias.detach()}
    if projection is None:
        return {}
    return {"head.weight": projection.mT.contiguous(), "head.bias": torch.zeros(projection.shape[1])}
