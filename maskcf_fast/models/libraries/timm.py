"""timm's vision transformers."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.names import did_you_mean
from ...core.tensors import save_tensors
from ..config import Activation, Pool, QkvBias, Rotary, VisionTransformerConfig
from ..head import ImageClassifier, LinearClassifier
from ..naming import State, timm_naming
from . import (
    PLAIN,
    PT,
    Classifier,
    Unmodified,
    Unsupported,
    check_settings,
    fits,
    is_exactly,
    loading,
    no_place,
    refuse_prompts,
    square,
    three,
    unusual,
    whole_patches,
)

ARGUMENTS = {"image_size": "img_size", "patch_size": "patch_size", "width": "embed_dim", "depth": "depth",
             "heads": "num_heads"}  # fmt: skip
POOLS: dict[str, Pool] = {"token": "class", "avg": "mean", "map": "attention"}
# The functions that make a `VisionTransformer` with these traits, whatever its sizes; {} is for QuickGELU.
ENTRIES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_siglip_224": {"pool": "attention", "output_dim": None, "eps": 1e-6, "gated_mlp": False},
    "vit_base_patch16_clip_{}224": {"pre_norm": True, "patch_bias": False, "eps": 1e-5, "gated_mlp": False},
    "vit_base_patch16_224": {"output_dim": None, "eps": 1e-6, "gated_mlp": False},
    "vit_giant_patch14_dinov2": {"output_dim": None, "eps": 1e-6, "gated_mlp": True},
}
# What the arguments say.
WRITTEN = ("output_dim", "layer_scale", "pool", "class_token", "registers", "positions", "qkv_bias", "qk_norm",
           "pool_norm", "pool_heads", "pool_mlp_width")  # fmt: skip


def load_module(name: str, pretrained: bool = True, **options: Any) -> Any:
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
        model = timm.create_model(name, pretrained=pretrained, **options).eval()
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


def architecture(name: str) -> VisionTransformerConfig:
    """The architecture, of a model on the meta device."""
    with torch.device("meta"):
        return vision_config(readable(load_module(name, pretrained=False)))


def readable(model: Any) -> Any:
    """A model on the meta device with a head whose bias can be read: zeros, as a projection has it."""
    pre_norm = not isinstance(getattr(model, "norm_pre", None), nn.Identity | None)
    if isinstance(getattr(model, "head", None), nn.Linear) and pre_norm:
        model.head.bias = nn.Parameter(torch.zeros(model.head.out_features, device="cpu"))
    return model


def unmodified(name: str, image_size: int | None, pretrained: bool) -> Unmodified:
    """The model without its classifier; that of a CLIP is the projection."""
    import timm

    options = {} if image_size is None else {"img_size": image_size}
    try:
        model = load_module(name, pretrained, **options)
    except UserError as error:
        if options and isinstance(error.__cause__, TypeError):
            raise UserError(f"timm:{name} runs at its own image size only: leave out --model.image-size") from error
        raise
    data = timm.data.resolve_model_data_config(model)
    side = image_size or getattr(getattr(model, "patch_embed", None), "img_size", None) or data["input_size"][1:]
    features = operator.call if "_clip_" in str(model.pretrained_cfg.get("architecture")) else _before_classifier
    call = f"timm.create_model({', '.join([repr(name), *(f'{k}={v}' for k, v in options.items())])})"
    return Unmodified(model, features, square(side), three(data["mean"]), three(data["std"]), call)


def _before_classifier(model: Any, pixels: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(pixels), pre_logits=True)


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
    with torch.device("cpu"):  # its normalisation, also of a model without values
        transform = timm.data.create_transform(**data, is_training=False)
    return Classifier(model, model, transform, data["mean"], data["std"], classes)


def vision_config(model: Any) -> VisionTransformerConfig:
    """The architecture of a vision transformer, of timm's `VisionTransformer` or `Eva`."""
    from timm.layers import AttentionRope, GluMlp, LayerNorm, Mlp, PatchEmbed, QuickGELU, SwiGLU
    from timm.models.eva import Eva, EvaAttention, EvaBlock
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    eva = is_exactly(model, Eva)
    if not (eva or is_exactly(model, VisionTransformer)):
        raise Unsupported(f"it is a {type(model).__name__}, neither timm's VisionTransformer nor its Eva")
    if not is_exactly(model.patch_embed, PatchEmbed):
        raise Unsupported(f"its first layer is a {type(model.patch_embed).__name__}, no convolution of patches alone")
    if not isinstance(model.patch_embed.norm, nn.Identity):
        raise Unsupported("its patches are normalised before they get a position")
    attentions: tuple[type, ...] = (EvaAttention, AttentionRope) if eva else (Attention,)
    for block in model.blocks:
        plain = is_exactly(block, EvaBlock if eva else Block) and type(block.attn) in attentions
        if not (plain and type(block.mlp) in (Mlp, GluMlp, SwiGLU)):
            raise Unsupported(f"its blocks are not timm's plain pre-norm blocks, but a {type(block).__name__}")
        if getattr(block.attn, "gate", None) is not None or getattr(block.attn, "num_kv_groups", 1) != 1:
            raise Unsupported("its attention has gates, or fewer keys than queries")
    block = model.blocks[0]
    attention, mlp = block.attn, block.mlp
    if eva and (block.gamma_1 is None) != (block.gamma_2 is None):
        raise Unsupported("only some of its branches are scaled")
    norms = (nn.LayerNorm, LayerNorm)
    within = [module for name, module in block.named_modules() if "norm" in name.rpartition(".")[2]]
    if any(type(module) not in (*norms, nn.Identity) for module in within):
        raise Unsupported("its blocks have norms other than LayerNorm")
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    class_token = model.cls_token is not None
    if model.num_prefix_tokens != class_token + registers:
        raise Unsupported(
            f"it has {model.num_prefix_tokens} tokens before the patches, not one class token and registers"
        )
    if registers and model.pos_embed is not None and not model.no_embed_class:
        raise Unsupported("its registers have position embeddings")
    if model.global_pool not in POOLS:
        raise Unsupported(f"its feature is pooled by {model.global_pool!r}, not {', '.join(map(repr, POOLS))}")
    if model.global_pool == "map":
        _check_pool(model)
        if class_token and not eva and not model.pool_include_prefix:
            raise Unsupported("its attention pool leaves out a class token that the patches see")
    last = [norm for norm in (model.norm, model.fc_norm) if type(norm) in norms]
    if len(last) != 1:
        raise Unsupported(f"it has {len(last)} LayerNorms after its last block, not one")
    pre_norm = not isinstance(model.norm_pre, nn.Identity)
    head, gated = model.head, not is_exactly(mlp, Mlp)
    if is_exactly(mlp, GluMlp) and (mlp.gate_last or mlp.chunk_dim != -1):
        raise Unsupported("its MLPs are gated by their second half")
    # The projection of a CLIP is kept in the head: EVA-CLIP's with a bias, the others' with one of zero.
    clip = eva and "_clip_" in str(model.pretrained_cfg.get("architecture"))
    projects = isinstance(head, nn.Linear) and (clip or (pre_norm and not bool(head.bias.any())))
    hidden = mlp.fc1_g.out_features if is_exactly(mlp, SwiGLU) else mlp.fc1.out_features // (1 + gated)
    patch_size, pooled = square(model.patch_embed.patch_size), model.global_pool == "map"
    return VisionTransformerConfig(
        image_size=whole_patches(square(model.patch_embed.img_size), patch_size),
        patch_size=patch_size,
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=attention.num_heads,
        output_dim=head.out_features if projects else None,
        activation=activation(mlp.act, QuickGELU),
        mean=three(model.pretrained_cfg["mean"]),
        std=three(model.pretrained_cfg["std"]),
        pre_norm=pre_norm,
        patch_bias=model.patch_embed.proj.bias is not None,
        layer_scale=block.gamma_1 is not None if eva else not isinstance(block.ls1, nn.Identity),
        mlp_width=unusual(hidden, model.embed_dim),
        eps=last[0].eps,
        pool=POOLS[model.global_pool],
        class_token=class_token,
        registers=registers,
        positions="none" if model.pos_embed is None else ("patches" if class_token and model.no_embed_class else "all"),
        rotary=None if getattr(model, "rope", None) is None else _rotary(model.rope),
        qkv_bias=_qkv_bias(attention),
        qk_norm=type(attention.q_norm) in norms,
        attention_norm=type(attention.norm) in norms,
        gated_mlp=gated,
        mlp_norm=type(mlp.norm) in norms,
        pool_norm=model.global_pool == "avg" and last[0] is model.fc_norm,
        pool_heads=model.attn_pool.num_heads if pooled and model.attn_pool.num_heads != attention.num_heads else None,
        pool_mlp_width=model.attn_pool.mlp.fc1.out_features
        if pooled and model.attn_pool.mlp.fc1.out_features != hidden
        else None,
        projection_bias=clip and projects,
    )


def _qkv_bias(attention: Any) -> QkvBias:
    if attention.qkv is not None and attention.qkv.bias is not None:
        return "qkv"
    q = getattr(attention, "q_bias", None) if attention.qkv is not None else attention.q_proj.bias
    if q is None:
        return "none"
    return "qkv" if attention.qkv is None and attention.k_proj.bias is not None else "qv"


def _rotary(rope: Any) -> Rotary:
    """The rotary positions that a module of timm makes."""
    from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3

    if is_exactly(rope, RotaryEmbeddingDinoV3):
        if rope.normalize_coords != "separate" or rope.grid_offset or rope.min_period is not None:
            raise Unsupported("its rotary positions are not DINOv3's")
        columns = rope.grid_indexing == "xy"
        return Rotary(rope.temperature, "centred", columns_first=columns, halves=rope.rotate_half)
    if not is_exactly(rope, RotaryEmbeddingCat) or rope.in_pixels or rope.grid_type != "index":
        raise Unsupported(f"its rotary positions are {type(rope).__name__}")
    return Rotary(
        rope.temperature,
        offset=rope.grid_offset,
        grid=None if rope.ref_feat_shape is None else square(rope.ref_feat_shape),
        columns_first=rope.grid_indexing == "xy",
        halves=rope.rotate_half,
    )


def _check_pool(model: Any) -> None:
    """Raise unless the pool is SigLIP's: one probe, and an MLP with the blocks' activation."""
    from timm.layers import Mlp
    from timm.layers.attention_pool import AttentionPoolLatent

    pool = model.attn_pool
    plain = (
        is_exactly(pool, AttentionPoolLatent)
        and is_exactly(pool.q, nn.Linear)
        and pool.q.bias is not None
        and pool.pos_embed is None
        and isinstance(pool.k_norm, nn.Identity)
        and is_exactly(pool.mlp, Mlp)
        and type(pool.mlp.act) is type(model.blocks[0].mlp.act)
        and (pool.latent_len, pool.latent_dim, pool.out_features) == (1, model.embed_dim, model.embed_dim)
    )
    if not plain:
        raise Unsupported("its attention pool is not SigLIP's")


def activation(module: nn.Module, quick: type) -> Activation:
    """What a module of timm or open_clip computes; ``quick`` is the library's QuickGELU."""
    if isinstance(module, quick):
        return "quick_gelu"
    if type(module).__name__ in ("SiLU", "Swish"):
        return "silu"
    if type(module).__name__ == "GELUTanh":
        return "gelu_tanh"
    if type(module).__name__ == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_tanh"
    raise Unsupported(f"its activation is {module}")


def write(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
    """Write ``config.json`` and ``model.safetensors``; arguments, result and errors as for Hugging Face.

    timm's head is a linear layer on the class token. A linear head on a projected feature is one too, once the two
    products are multiplied. A cosine head is none: then the projection takes that place, as in timm's own CLIPs.
    """
    config, state = _without_class_position(model.transformer.config, model.transformer.state_dict())
    name, args = _eva(config) if is_eva(config) else _vit(config)
    projection, bias = state.pop("projection", None), state.pop("projection_bias", None)
    inside = isinstance(model.head, LinearClassifier)
    head = _head(model, projection, bias, inside)
    args |= {theirs: getattr(config, ours) for ours, theirs in ARGUMENTS.items()}
    args |= {"global_pool": next(theirs for theirs, ours in POOLS.items() if ours == config.pool)}
    args |= {"class_token": config.class_token, "no_embed_class": config.positions == "patches"}
    args |= {"init_values": 1e-5 if config.layer_scale else None, "qk_norm": config.qk_norm}
    num_classes = head["head.weight"].shape[0] if head else 0
    settings = {
        "architecture": name,
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
    save_tensors(folder / "model.safetensors", {**timm_naming(config, is_eva(config)).to_theirs(state), **head}, PT)
    return 'timm.create_model("local-dir:{out}", pretrained=True)', inside


def is_eva(config: VisionTransformerConfig) -> bool:
    """Whether it takes an `Eva` to express a model; a `VisionTransformer` does for the others."""
    return config.rotary is not None or config.attention_norm or config.mlp_norm or config.qkv_bias == "qv"


def _vit(config: VisionTransformerConfig) -> tuple[str, dict[str, Any]]:
    """The function that makes such a `VisionTransformer`, and its arguments."""
    kind = "SigLIP" if config.pool == "attention" else "ViT"
    usual = {name: value for name, value in PLAIN.items() if name not in WRITTEN}
    name = next((name for name, traits in ENTRIES.items() if fits(config, usual | traits)), None)
    hidden = config.mlp_width or 4 * config.width
    pooled = config.pool == "attention" and config.class_token  # which the pool would leave out
    if name is None or pooled or (config.gated_mlp and config.activation != "silu"):
        raise no_place("timm", kind, config)
    quick = config.activation == "quick_gelu"
    args: dict[str, Any] = {
        # Rounded down again.
        **({"mlp_ratio": (hidden * (1 + config.gated_mlp) + 0.5) / config.width} if config.mlp_width else {}),
        "reg_tokens": config.registers,
        "qkv_bias": config.qkv_bias == "qkv",
        "fc_norm": config.pool_norm,
    }
    if config.pool_heads or config.pool_mlp_width:
        raise no_place("timm", kind, config)
    if (config.activation in ("gelu_tanh", "silu") and not config.gated_mlp) or (quick and "{}" not in name):
        args["act_layer"] = config.activation
    return name.format("quickgelu_" if quick else ""), args


def _eva(config: VisionTransformerConfig) -> tuple[str, dict[str, Any]]:
    """The same for an `Eva`."""
    rotary, hidden = config.rotary, config.mlp_width or 4 * config.width
    centred = rotary is not None and rotary.coordinates == "centred"
    name = "eva02_base_patch14_224" if config.eps == 1e-6 else "vit_pe_core_base_patch16_224"
    if centred and config.eps == 1e-5:
        name = "vit_small_patch16_dinov3"
    if config.projection_bias:  # which is told by the name
        name = "eva02_base_patch16_clip_224"
    expected = {"eps": 1e-6 if name.startswith("eva") else 1e-5, "activation": "silu" if config.gated_mlp else "gelu"}
    if not fits(config, {**expected, "patch_bias": not config.pre_norm}) or (
        config.pool == "attention" and config.gated_mlp
    ):
        raise no_place("timm", "Eva", config)
    args: dict[str, Any] = {
        "mlp_ratio": (hidden + 0.5) / config.width,
        "num_reg_tokens": config.registers,
        "qkv_bias": config.qkv_bias != "none",
        "qkv_fused": config.qkv_bias != "qv",
        "attn_type": "rope" if config.qkv_bias == "qkv" else "eva",
        "swiglu_mlp": config.gated_mlp,
        "swiglu_align_to": 0,
        "scale_mlp": config.mlp_norm,
        "scale_attn_inner": config.attention_norm,
        "use_pre_transformer_norm": config.pre_norm,
        "use_post_transformer_norm": not config.pool_norm,
        "use_fc_norm": config.pool_norm,
        "use_abs_pos_emb": config.positions != "none",
        "use_rot_pos_emb": rotary is not None,
        "attn_pool_num_heads": config.pool_heads,
        "attn_pool_mlp_ratio": ((config.pool_mlp_width or hidden) + 0.5) / config.width,
        "dynamic_img_size": False,
    }
    if rotary is not None:
        args |= {
            "rope_type": "dinov3" if centred else "cat",
            "rope_temperature": rotary.theta,
            "rope_grid_offset": rotary.offset,
            "rope_grid_indexing": "xy" if rotary.columns_first else "ij",
            "rope_rotate_half": rotary.halves,
            "ref_feat_shape": rotary.grid and [rotary.grid] * 2,
        }
    return name, args


def _without_class_position(
    config: VisionTransformerConfig, state: Mapping[str, Tensor]
) -> tuple[VisionTransformerConfig, State]:
    """The same model with the class token's position added to it: in timm, beside registers it has none of its own."""
    state = dict(state)
    if config.registers and config.prefix_positions:
        positions = state["position_embedding"]
        state["class_embedding"] = state["class_embedding"] + positions[0]
        state["position_embedding"] = positions[1:]
        config = replace(config, positions="patches")
    return config, state


def _head(model: ImageClassifier, projection: Tensor | None, bias: Tensor | None, linear: bool) -> dict[str, Tensor]:
    if linear:
        weight, own = model.head.weight.detach().double(), model.head.bias.detach().double()
        own = own if bias is None else own + weight @ bias.double()
        weight = weight if projection is None else weight @ projection.mT.double()
        return {"head.weight": weight.float().contiguous(), "head.bias": own.float()}
    if projection is None:
        return {}
    return {
        "head.weight": projection.mT.contiguous(),
        "head.bias": projection.new_zeros(projection.shape[1]) if bias is None else bias,
    }
