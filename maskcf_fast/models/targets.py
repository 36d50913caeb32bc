"""Writing a classifier as checkpoints that other libraries load: the inverse of `load_source`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .architectures import HF_ACTIVATIONS, timm_config
from .config import VisionTransformerConfig
from .head import ImageClassifier, LinearClassifier
from .layouts import HF_CLIP, HF_DINOV2, HF_SIGLIP, HF_VIT, OPEN_CLIP, TIMM, Layout

PT = {"format": "pt"}  # Hugging Face refuses files that do not say so


def write_hugging_face(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Args:
        model: The classifier, on the CPU.
        classes: Names of its outputs.
        folder: An empty folder.

    Returns:
        How to load it, and whether the head is inside: ViT's classifier is a linear head on the same feature.

    Raises:
        ImportError: transformers is not installed.
        ValueError: It has no such architecture.
    """
    config = model.backbone.config
    kind, layout, prefix, settings = _hugging_face_kind(config, isinstance(model.head, LinearClassifier))
    state = layout.to_theirs(model.backbone.state_dict())
    outside = ("visual_projection.",)
    state = {name if name.startswith(outside) else prefix + name: tensor for name, tensor in state.items()}
    if kind.startswith("Dinov2"):
        state["embeddings.mask_token"] = torch.zeros(1, config.width)
    inside = kind == "ViTForImageClassification"
    if inside:
        state |= {f"classifier.{name}": tensor for name, tensor in model.head.state_dict().items()}
        settings.id2label = dict(enumerate(classes))
        settings.label2id = {name: i for i, name in enumerate(classes)}
    settings.architectures = [kind]
    settings.dtype = "float32"
    settings.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", PT)
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2))
    return f'transformers.{kind}.from_pretrained("{{out}}")', inside


def _hugging_face_kind(config: VisionTransformerConfig, linear: bool) -> tuple[str, Layout, str, Any]:
    """The class, its names, their prefix, and its configuration."""
    import transformers

    common: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": next(theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_eps": config.eps,
    }
    hidden = config.mlp_width or 4 * config.width
    shape = (config.pre_norm, config.patch_bias, config.layer_scale)
    if config.pool == "attention":
        if config.output_dim is None and shape == (False, True, False):
            settings = transformers.SiglipVisionConfig(**common, intermediate_size=hidden)
            return "SiglipVisionModel", HF_SIGLIP, "vision_model.", settings
        raise _no_place("Hugging Face", "SigLIP", config)
    if shape == (True, False, False):
        projects = config.output_dim is not None
        kind = "CLIPVisionModelWithProjection" if projects else "CLIPVisionModel"
        common |= {"intermediate_size": hidden, "projection_dim": config.output_dim or 512}
        return kind, HF_CLIP, "vision_model.", transformers.CLIPVisionConfig(**common)
    if config.output_dim is None and shape == (False, True, False):
        kind, prefix = ("ViTForImageClassification", "vit.") if linear else ("ViTModel", "")
        return kind, HF_VIT, prefix, transformers.ViTConfig(**common, intermediate_size=hidden)
    if config.output_dim is None and shape == (False, True, True) and hidden % config.width == 0:
        return "Dinov2Model", HF_DINOV2, "", transformers.Dinov2Config(**common, mlp_ratio=hidden // config.width)
    raise _no_place("Hugging Face", "CLIP, ViT or DINOv2", config)


def write_open_clip(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
    """Write the ``visual`` part of an open_clip model; arguments, result and errors as `write_hugging_face`."""
    config = model.backbone.config
    state = model.backbone.state_dict()
    if config.pool == "attention":  # a timm model within an open_clip one, whose names alone choose the architecture
        name = _open_clip_siglip(config)
        if name is None:
            raise _no_place("open_clip", "SigLIP", config)
        state = {f"trunk.{name}": tensor for name, tensor in TIMM.to_theirs(state).items()}
    elif config.output_dim is None or config.patch_bias or config.eps != 1e-5:
        raise _no_place("open_clip", "vision transformer", config)
    else:
        name = _open_clip_name(config)
        state = OPEN_CLIP.to_theirs(state)
    save_file(state, folder / "model.safetensors", PT)
    create = f'open_clip.create_model("{name}")' if name else "model"
    return f'{create}.visual.load_state_dict(safetensors.torch.load_file("{{out}}/model.safetensors"))', False


def _open_clip_name(config: VisionTransformerConfig) -> str | None:
    """The shortest of open_clip's names for the architecture, with CLIP's own text tower if there is one."""
    import open_clip

    names = []
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        vision = cfg["vision_cfg"]
        plain = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
        if set(vision) <= plain and not config.layer_scale and config.pre_norm:
            heads = vision["width"] // vision.get("head_width", 64)
            sizes = (vision["image_size"], vision["patch_size"], vision["width"], vision["layers"], heads)
            hidden = int(vision["width"] * vision.get("mlp_ratio", 4.0))
            wanted = (config.image_size, config.patch_size, config.width, config.depth, config.heads)
            activation = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
            if (sizes, hidden, cfg["embed_dim"], activation) == (
                wanted, config.mlp_width or 4 * config.width, config.output_dim, config.activation,
            ):  # fmt: skip
                names.append(name)
    return min(names, key=lambda name: (not name.startswith("ViT-"), len(name)), default=None)


def _open_clip_siglip(config: VisionTransformerConfig) -> str | None:
    """The shortest of open_clip's names of SigLIPs for the architecture."""
    import open_clip
    import timm

    names = []
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        vision = cfg["vision_cfg"]
        pool = (vision.get("timm_pool"), vision.get("timm_proj"))
        if pool == ("map", "none") and (vision["image_size"], cfg["embed_dim"]) == (config.image_size, config.width):
            with torch.device("meta"):
                trunk = timm.create_model(vision["timm_model_name"], num_classes=0)
            if replace(timm_config(trunk), mean=config.mean, std=config.std) == config:
                names.append(name)
    return min(names, key=lambda name: (not name.startswith("ViT-"), len(name)), default=None)


def write_timm(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
    """Write a timm ViT as ``config.json`` and ``model.safetensors``.

    timm's head is a linear layer on the class token. A linear head on a projected feature is one too, once the two
    products are multiplied. A cosine head is none: then the projection takes that place, as in timm's own CLIPs.
    Arguments, result and errors as `write_hugging_face`.
    """
    config = model.backbone.config
    quick = "quickgelu_" if config.activation == "quick_gelu" else ""
    if config.pool == "attention" and not config.pre_norm and config.patch_bias and config.eps == 1e-6:
        name = "vit_base_patch16_siglip_224"
    elif config.pool == "attention":
        raise _no_place("timm", "SigLIP", config)
    elif config.pre_norm and not config.patch_bias and config.eps == 1e-5:
        name = f"vit_base_patch16_clip_{quick}224"
    elif not config.pre_norm and config.patch_bias and config.eps == 1e-6:
        name = "vit_base_patch16_224"
    else:
        raise _no_place("timm", "ViT", config)
    state = dict(model.backbone.state_dict())
    projection = state.pop("projection", None)
    state = TIMM.to_theirs(state)
    inside = isinstance(model.head, LinearClassifier)
    head = _timm_head(model, projection, inside)
    state |= head
    args: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    if config.mlp_width:
        args["mlp_ratio"] = (config.mlp_width + 0.5) / config.width  # rounded down again
    if config.layer_scale:
        args["init_values"] = 1e-5
    if config.activation == "gelu_tanh" or (quick and not config.pre_norm):
        args["act_layer"] = config.activation
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
    save_file(state, folder / "model.safetensors", PT)
    return 'timm.create_model("local-dir:{out}", pretrained=True)', inside


def _timm_head(model: ImageClassifier, projection: Tensor | None, linear: bool) -> dict[str, Tensor]:
    if linear:
        weight = model.head.weight.detach()
        weight = weight if projection is None else (weight.double() @ projection.mT.double()).float()
        return {"head.weight": weight.contiguous(), "head.bias": model.head.bias.detach()}
    if projection is None:
        return {}
    return {"head.weight": projection.mT.contiguous(), "head.bias": torch.zeros(projection.shape[1])}


def _no_place(library: str, kinds: str, config: VisionTransformerConfig) -> ValueError:
    traits = ", ".join(
        f"{name}={getattr(config, name)}"
        for name in ("pool", "activation", "pre_norm", "patch_bias", "layer_scale", "output_dim", "eps", "mlp_width")
    )
    return ValueError(f"{library} has no {kinds} with {traits}: choose another --to")
