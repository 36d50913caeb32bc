"""Hugging Face's vision transformers: CLIP, SigLIP, ViT and DINOv2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ...core.files import read_json
from ...core.tensors import save_tensors
from ..config import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Activation, VisionTransformerConfig
from ..head import ImageClassifier, LinearClassifier
from ..naming import HF_CLIP, HF_DINOV2, HF_SIGLIP, HF_VIT, Naming, State
from ..weights import read_state
from . import (
    PT,
    Classifier,
    TextTower,
    check_sizes,
    fits,
    loading,
    no_place,
    refuse_prompts,
    square,
    three,
    unsupported,
    unusual,
    whole_patches,
    zero_shot,
)

ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
SETTINGS = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
            "eps": "layer_norm_eps"}  # fmt: skip
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Family:
    """One architecture, read and written by the same table.

    Attributes:
        naming: Names and shapes of its tensors.
        settings: Class of its configuration.
        traits: What is the same in all its models, by the names of `VisionTransformerConfig`.
        normalisation: Mean and standard deviation where there is no preprocessor's file.
    """

    naming: Naming
    settings: str
    traits: Mapping[str, Any]
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = (HALF, HALF)


PLAIN = {"pre_norm": False, "patch_bias": True, "layer_scale": False, "pool": "class"}
FAMILIES = {
    "clip": Family(
        HF_CLIP, "CLIPVisionConfig", {**PLAIN, "pre_norm": True, "patch_bias": False}, (CLIP_MEAN, CLIP_STD)
    ),
    "siglip": Family(HF_SIGLIP, "SiglipVisionConfig", {**PLAIN, "pool": "attention"}),
    "vit": Family(HF_VIT, "ViTConfig", PLAIN),
    "dinov2": Family(HF_DINOV2, "Dinov2Config", {**PLAIN, "layer_scale": True}, (IMAGENET_MEAN, IMAGENET_STD)),
}
REASONS = {
    "siglip2": "its images are of any shape (NaFlex); SigLIP 2 of a fixed resolution is supported",
    "dinov2_with_registers": "it has register tokens",
    "dinov3_vit": "it has register tokens and rotary positions",
}


def tower(name: str) -> tuple[VisionTransformerConfig, State]:
    """The architecture and the tensors in the files of a folder or a hub's repository."""
    settings = _settings(name)
    with loading(f"hf:{name}"):
        file = next((file for file in map(lambda file: _file(name, file), WEIGHTS) if file is not None), None)
        if file is None:
            raise UserError(f"hf:{name} has none of {', '.join(WEIGHTS)}")
        if file.suffix == ".json":  # on the hub, the shards have to be asked for
            for part in set(read_json(file).get("weight_map", {}).values()):
                _file(name, part)
        state = read_state(file)
        pixels = _file(name, "preprocessor_config.json")
    return vision_config(settings, state, read_json(pixels) if pixels else {}), state


def vision_config(settings: Any, state: State, pixels: dict[str, Any]) -> VisionTransformerConfig:
    """The architecture that a configuration, its weights and its preprocessor's settings describe."""
    kind = settings.model_type.removesuffix("_vision_model")
    if kind not in FAMILIES:
        raise unsupported(REASONS.get(kind, f"{kind} is neither CLIP, SigLIP, ViT nor DINOv2"))
    family, vision = FAMILIES[kind], getattr(settings, "vision_config", settings)
    if vision.hidden_act not in ACTIVATIONS:
        raise unsupported(f"its activation is {vision.hidden_act}")
    if getattr(vision, "use_swiglu_ffn", False):
        raise unsupported("its MLPs are SwiGLU")
    if not getattr(vision, "qkv_bias", True):
        raise unsupported("its attention has no bias")
    if not getattr(vision, "vision_use_head", True):
        raise unsupported("its attention pool is left out (vision_use_head)")
    ratio = getattr(vision, "mlp_ratio", None)
    hidden = vision.intermediate_size if ratio is None else int(vision.hidden_size * ratio)
    patch_size = square(vision.patch_size)
    projection = state.get("visual_projection.weight")
    return VisionTransformerConfig(
        **{ours: getattr(vision, theirs) for ours, theirs in SETTINGS.items()},
        **family.traits,
        image_size=whole_patches(square(vision.image_size), patch_size),
        patch_size=patch_size,
        output_dim=None if projection is None else projection.shape[0],
        activation=ACTIVATIONS[vision.hidden_act],
        mean=three(pixels.get("image_mean") or family.normalisation[0]),
        std=three(pixels.get("image_std") or family.normalisation[1]),
        mlp_width=unusual(hidden, vision.hidden_size),
    )


def text_tower(name: str, device: str) -> TextTower:
    """The text tower of a CLIP or SigLIP."""
    from transformers import AutoModel

    settings = _settings(name)
    if settings.model_type not in ("clip", "siglip"):
        raise UserError(
            f"hf:{name} is of the kind {settings.model_type}, which has no text tower (clip and siglip have): train "
            "with --model.head-kind linear"
        )
    with loading(f"hf:{name}"):
        model = AutoModel.from_pretrained(name, trust_remote_code=False, dtype=torch.float32).to(device).eval()
        return _text(model, name)


def _text(model: Any, name: str) -> TextTower:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    siglip = model.config.model_type == "siglip"
    longest = model.config.text_config.max_position_embeddings
    options: dict[str, Any] = {"truncation": True, "max_length": longest, "return_tensors": "pt"}

    def encode(prompts: list[str]) -> Tensor:
        if siglip:  # trained on lower case, padded to the full length, and on the padding as well: without a mask
            tokens = tokenizer([prompt.lower() for prompt in prompts], padding="max_length", **options)
            tokens = {"input_ids": tokens["input_ids"]}
        else:
            tokens = tokenizer(prompts, padding=True, **options)
        with torch.no_grad():
            return _features(model.get_text_features(**{k: v.to(model.device) for k, v in tokens.items()}))

    return TextTower(encode, float(model.logit_scale.detach().exp()))


def classifier(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Classifier:
    """A classifier of images, or with prompts a CLIP or SigLIP."""
    import transformers

    settings = _settings(name)
    kind: Any = transformers.AutoModel if prompts else transformers.AutoModelForImageClassification
    with loading(f"hf:{name}"):
        if pretrained:
            model, report = kind.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
            if report["missing_keys"]:
                missing = ", ".join(sorted(report["missing_keys"])[:3])
                raise UserError(
                    f"the weights of {name} lack {missing}: no image classifier. For a CLIP-like model, give --prompts"
                )
        else:
            model = kind.from_config(settings, trust_remote_code=False)
        model.to(device).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    logits, classes = model, dict(model.config.id2label)
    if prompts:
        if not hasattr(model, "get_text_features"):
            refuse_prompts(prompts)
        with loading(f"the text tower of hf:{name}"):
            text = _text(model, name)
        logits = zero_shot(lambda x: _features(model.get_image_features(pixel_values=x)), text, prompts)
        classes = dict(enumerate(prompts))
    return Classifier(
        logits,
        model,
        lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0],
        processor.image_mean,
        processor.image_std,
        classes,
    )


def _settings(name: str) -> Any:
    """The configuration; what it asks for is bounded before any model is made of it."""
    from transformers import AutoConfig

    with loading(f"hf:{name}"):
        if (file := _file(name, "config.json")) is not None:
            check_sizes(read_json(file), str(file))
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _file(name: str, file: str) -> Path | None:
    """A file of a local folder or of a hub repository, or None where there is no such file."""
    from transformers.utils import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _features(output: Any) -> Tensor:
    """Features are returned as such, or in an object, as the version of the library has it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def write(model: ImageClassifier, classes: Sequence[str], folder: Path) -> tuple[str, bool]:
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
    kind, prefix, family, settings = _kind(config, isinstance(model.head, LinearClassifier))
    state = family.naming.to_theirs(model.backbone.state_dict())
    state = {name if name.startswith("visual_projection.") else prefix + name: t for name, t in state.items()}
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
    save_tensors(folder / "model.safetensors", state, PT)
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


def _kind(config: VisionTransformerConfig, linear: bool) -> tuple[str, str, Family, Any]:
    """The model's class, the prefix of its names, its family, and its configuration."""
    import transformers

    name = next((name for name, family in FAMILIES.items() if fits(config, family.traits)), None)
    hidden = config.mlp_width or 4 * config.width
    whole = hidden % config.width == 0
    if name is None or (config.output_dim and name != "clip") or (name == "dinov2" and not whole):
        kinds = "SigLIP" if config.pool == "attention" else "CLIP, ViT or DINOv2"
        raise no_place("Hugging Face", kinds, config)
    family = FAMILIES[name]
    settings = {
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        **({"mlp_ratio": hidden // config.width} if name == "dinov2" else {"intermediate_size": hidden}),
        **({"projection_dim": config.output_dim or 512} if name == "clip" else {}),
    }
    kind, prefix = {
        "clip": ("CLIPVisionModelWithProjection" if config.output_dim else "CLIPVisionModel", "vision_model."),
        "siglip": ("SiglipVisionModel", "vision_model."),
        "vit": ("ViTForImageClassification", "vit.") if linear else ("ViTModel", ""),
        "dinov2": ("Dinov2Model", ""),
    }[name]
    return kind, prefix, family, getattr(transformers, family.settings)(**settings)
