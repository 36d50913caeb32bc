"""open_clip's vision-language models: its own vision towers, and the timm ones of its SigLIPs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.errors import UserError
from ...core.names import did_you_mean
from ...core.tensors import save_tensors
from ..config import CLIP_MEAN, CLIP_STD, VisionTransformerConfig
from ..head import ImageClassifier
from ..naming import OPEN_CLIP, State, timm_naming
from . import (
    ANY,
    PLAIN,
    PT,
    Classifier,
    TextTower,
    Unmodified,
    Unsupported,
    check_settings,
    fits,
    is_exactly,
    loading,
    no_place,
    square,
    three,
    unusual,
    zero_shot,
)
from . import timm as timm_library


def load_module(name: str, pretrained: bool = True, device: torch.device | str = "cpu", **own: Any) -> Any:
    """The model that ``name`` stands for, in eval mode, with the activation its weights were trained with.

    open_clip itself only warns where the two differ, as for ``ViT-B-32/openai``.
    """
    import open_clip

    options: dict[str, Any] = {**own, "device": device, "weights_only": True, "load_weights": pretrained}
    if name.startswith(("hf-hub:", "local-dir:")):
        with loading(f"open_clip:{name}"), no_questions():
            check_settings(name, "open_clip_config.json")
            return open_clip.create_model(name, **options).eval()
    model, _, tag = name.partition("/")
    if model not in open_clip.list_models():
        raise UserError(f"open_clip has no model {model!r}{did_you_mean(model, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags and (pretrained or tag):
        known = f"one of {', '.join(tags)}" if tags else "weights, of which it has none"
        raise UserError(f"open_clip:{model}/PRETRAINED needs {known}, got {tag!r}{did_you_mean(tag, tags)}")
    quick = bool(tag and (open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    tag = tag if pretrained else ""  # even without load_weights, open_clip would download them
    with loading(f"open_clip:{name}"), no_questions():
        return open_clip.create_model(model, tag or None, force_quick_gelu=quick, **options).eval()


@contextmanager
def no_questions() -> Iterator[None]:
    """While it lasts, transformers refuses a text tower's own code at once, instead of asking whether to run it."""
    try:
        from transformers import dynamic_module_utils as utils
    except ImportError:  # then there is nothing that could ask
        yield
        return
    before, utils.TIME_OUT_REMOTE_CODE = utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        utils.TIME_OUT_REMOTE_CODE = before


def tower(name: str) -> tuple[VisionTransformerConfig, State]:
    """The architecture and the tensors of the ``visual`` part."""
    visual = load_module(name).visual
    return vision_config(visual), visual.state_dict()


def architecture(name: str) -> VisionTransformerConfig:
    """The architecture, of a model on the meta device."""
    visual = load_module(name, pretrained=False, device="meta").visual
    if hasattr(visual, "trunk"):
        timm_library.readable(visual.trunk)
    return vision_config(visual)


def unmodified(name: str, image_size: int | None, pretrained: bool) -> Unmodified:
    """The ``visual`` part."""
    options: dict[str, Any] = {} if image_size is None else {"force_image_size": image_size}
    visual = load_module(name, pretrained, **options).visual
    mean, std = (getattr(visual, f"image_{part}", None) for part in ("mean", "std"))
    model, _, tag = name.partition("/") if ":" not in name else (name, "", "")
    given = [repr(part) for part in (model, tag) if part] + [f"{key}={value}" for key, value in options.items()]
    call = f"open_clip.create_model({', '.join(given)}).visual"
    side = square(visual.image_size)
    return Unmodified(visual, operator.call, side, three(mean or CLIP_MEAN), three(std or CLIP_STD), call)


def text_tower(name: str, device: str) -> TextTower:
    """The part that reads prompts."""
    return _text(load_module(name, device=device), name)


def _text(clip: Any, name: str) -> TextTower:
    import open_clip

    with loading(f"the tokenizer of open_clip:{name}"), no_questions():
        tokenizer = open_clip.get_tokenizer(name if ":" in name else name.partition("/")[0])
    scale = clip.logit_scale.detach()

    def encode(prompts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return clip.encode_text(tokenizer(prompts).to(scale.device))

    return TextTower(encode, scale.exp())


def classifier(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Classifier:
    """The model, with prompts for classes."""
    clip = load_module(name, pretrained, device)
    if not prompts:
        raise UserError('an open_clip model has no classes: give --prompts "a photo of a cat" "a photo of a dog" …')
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    logits = zero_shot(clip.encode_image, _text(clip, name), prompts)
    return Classifier(logits, clip, transform, clip.visual.image_mean, clip.visual.image_std, dict(enumerate(prompts)))


def vision_config(visual: Any) -> VisionTransformerConfig:
    """The architecture of a vision tower."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    mean = three(getattr(visual, "image_mean", None) or CLIP_MEAN)
    std = three(getattr(visual, "image_std", None) or CLIP_STD)
    if is_exactly(visual, TimmModel):
        if len(visual.head):
            raise Unsupported(
                f"its vision tower has a head of its own: {', '.join(dict(visual.head.named_children()))}"
            )
        return replace(timm_library.vision_config(visual.trunk), mean=mean, std=std)
    if not is_exactly(visual, VisionTransformer):
        raise Unsupported(
            f"its vision tower is a {type(visual).__name__}, not a VisionTransformer of open_clip or timm"
        )
    block = visual.transformer.resblocks[0]
    if not is_exactly(block, ResidualAttentionBlock):
        raise Unsupported(f"its blocks are {type(block).__name__}s, not plain pre-norm blocks")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        raise Unsupported("its feature is pooled from all tokens, not read at the class token")
    return VisionTransformerConfig(
        image_size=square(visual.image_size),
        patch_size=square(visual.patch_size),
        width=visual.class_embedding.shape[0],
        depth=len(visual.transformer.resblocks),
        heads=block.attn.num_heads,
        output_dim=None if visual.proj is None else visual.proj.shape[1],
        activation=timm_library.activation(block.mlp.gelu, QuickGELU),
        mean=mean,
        std=std,
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        layer_scale=not isinstance(block.ls_1, nn.Identity),
        mlp_width=unusual(block.mlp.c_fc.out_features, block.mlp.c_fc.in_features),
        eps=visual.ln_post.eps,
    )


def write(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
    """Write the ``visual`` part of a model; arguments, result and errors as for Hugging Face."""
    config = model.transformer.config
    state = model.transformer.state_dict()
    name = known_name(config)
    if _own(config):
        state = OPEN_CLIP.to_theirs(state)
    elif name is None:
        raise no_place("open_clip", "SigLIP" if config.pool == "attention" else "vision transformer", config)
    else:  # a timm model within an open_clip one, whose names alone choose the architecture
        naming = timm_naming(config, timm_library.is_eva(config))
        state = {f"trunk.{name}": tensor for name, tensor in naming.to_theirs(state).items()}
        if config.output_dim and not config.projection_bias:
            state["trunk.head.bias"] = torch.zeros(config.output_dim)
    save_tensors(folder / "model.safetensors", state, PT)
    size = "" if _size(name) == config.image_size else f", force_image_size={config.image_size}"
    create = f'open_clip.create_model("{name}"{size})' if name else "model"
    return f'{create}.visual.load_state_dict(safetensors.torch.load_file("{{out}}/model.safetensors"))', False


def known_name(config: VisionTransformerConfig) -> str | None:
    """The shortest of open_clip's names for the architecture, with CLIP's own text tower if there is one.

    Of another image size only where none has this one: ``force_image_size`` then makes it so.
    """
    import open_clip

    is_it = _is_clip if _own(config) else _is_trunk
    names = sorted(
        open_clip.list_models(),
        key=lambda name: (_size(name) != config.image_size, not name.startswith("ViT-"), len(name)),
    )
    return next((name for name in names if is_it(open_clip.get_model_config(name), config)), None)


def _size(name: str | None) -> int | None:
    import open_clip

    return open_clip.get_model_config(name)["vision_cfg"].get("image_size") if name else None


def _is_clip(theirs: dict[str, Any], config: VisionTransformerConfig) -> bool:
    vision = theirs["vision_cfg"]
    plain = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
    if not set(vision) <= plain or config.layer_scale or not config.pre_norm:
        return False
    width = vision["width"]
    return (
        vision["patch_size"], width, vision["layers"], width // vision.get("head_width", 64),
        int(width * vision.get("mlp_ratio", 4.0)), theirs["embed_dim"],
        "quick_gelu" if theirs.get("quick_gelu") else "gelu",
    ) == (
        config.patch_size, config.width, config.depth, config.heads,
        config.mlp_width or 4 * config.width, config.output_dim, config.activation,
    )  # fmt: skip


def _own(config: VisionTransformerConfig) -> bool:
    """Whether it is a model of open_clip's own vision transformer."""
    traits = {**PLAIN, "output_dim": ANY, "layer_scale": ANY, "pre_norm": ANY, "patch_bias": False, "eps": 1e-5}
    return config.output_dim is not None and fits(config, traits)


def _is_trunk(theirs: dict[str, Any], config: VisionTransformerConfig) -> bool:
    import timm

    vision = theirs["vision_cfg"]
    name, projection = vision.get("timm_model_name", ""), vision.get("timm_proj")
    pool = next(theirs for theirs, ours in timm_library.POOLS.items() if ours == config.pool)
    if not name.startswith(("eva", "vit")) or (vision.get("timm_pool"), projection in ("none", None)) != (pool, True):
        return False
    if theirs["embed_dim"] != config.feature_dim or (projection == "none") != (config.output_dim is None):
        return False
    with torch.device("meta"):
        trunk: Any = timm.create_model(name, num_classes=config.output_dim or 0, global_pool=pool)
    if getattr(trunk, "embed_dim", None) != config.width:
        return False
    if config.output_dim and not config.projection_bias:
        timm_library.readable(trunk)
    try:
        known = timm_library.vision_config(trunk)
    except UserError:
        return False
    if known.patch_size != config.patch_size:  # so that the other size divides
        return False
    return replace(known, image_size=config.image_size, mean=config.mean, std=config.std) == config
