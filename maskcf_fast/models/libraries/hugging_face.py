"""Hugging Face's vision transformers: CLIP, SigLIP, ViT, I-JEPA, DINOv2 and DINOv3."""

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
from ..config import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Activation,
    QkvBias,
    Rotary,
    VisionTransformerConfig,
)
from ..head import ImageClassifier, LinearClassifier
from ..naming import (
    HF_CLIP,
    HF_DINOV2,
    HF_DINOV2_REGISTERS,
    HF_DINOV3,
    HF_SIGLIP,
    HF_VIT,
    Naming,
    State,
    class_position,
    gated,
)
from ..weights import indexed_files, read_state
from . import (
    ANY,
    PLAIN,
    PT,
    Classifier,
    TextTower,
    Unmodified,
    Unsupported,
    check_sizes,
    fits,
    loading,
    no_place,
    refuse_prompts,
    square,
    three,
    unusual,
    whole_patches,
    zero_shot,
)

ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu",
}  # fmt: skip
SETTINGS = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
            "eps": "layer_norm_eps"}  # fmt: skip
WITH_TEXT = ("clip", "metaclip_2", "siglip")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Family:
    """One architecture, read and written by the same table.

    Attributes:
        naming: Names and shapes of its tensors.
        settings: Class of its configuration.
        traits: What is the same in all its models, by the names of `VisionTransformerConfig`; ``ANY`` is not.
        normalisation: Mean and standard deviation where there is no preprocessor's file.
    """

    naming: Naming
    settings: str
    traits: Mapping[str, Any]
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = (HALF, HALF)


CLIP_TRAITS = {**PLAIN, "pre_norm": True, "patch_bias": False, "output_dim": ANY}
DINO_TRAITS = {**PLAIN, "layer_scale": True, "gated_mlp": ANY}
DINOV3_TRAITS = {**DINO_TRAITS, "registers": ANY, "positions": "none", "rotary": ANY, "qkv_bias": ANY}
CLIP_PIXELS, IMAGENET_PIXELS = (CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD)
# Written is the first that fits.
FAMILIES = {
    "clip": Family(HF_CLIP, "CLIPVisionConfig", CLIP_TRAITS, CLIP_PIXELS),
    "metaclip_2": Family(HF_CLIP, "MetaClip2VisionConfig", CLIP_TRAITS, CLIP_PIXELS),
    "siglip": Family(HF_SIGLIP, "SiglipVisionConfig", {**PLAIN, "pool": "attention", "class_token": False}),
    "vit": Family(HF_VIT, "ViTConfig", PLAIN),
    "vit_mae": Family(HF_VIT, "ViTMAEConfig", PLAIN, IMAGENET_PIXELS),
    "ijepa": Family(HF_VIT, "IJepaConfig", {**PLAIN, "pool": "mean", "class_token": False}, IMAGENET_PIXELS),
    "dinov2": Family(HF_DINOV2, "Dinov2Config", DINO_TRAITS, IMAGENET_PIXELS),
    "dinov2_with_registers": Family(
        HF_DINOV2_REGISTERS, "Dinov2WithRegistersConfig", {**DINO_TRAITS, "registers": ANY}, IMAGENET_PIXELS
    ),
    "dinov3_vit": Family(HF_DINOV3, "DINOv3ViTConfig", DINOV3_TRAITS, IMAGENET_PIXELS),
}
REASONS = {
    "siglip2": "its images are of any shape (NaFlex); SigLIP 2 of a fixed resolution is supported",
    "timm_wrapper": "it is a model of timm: take timm:hf-hub:ID or timm:local-dir:FOLDER",
}
QKV_BIAS: dict[tuple[bool, bool, bool], QkvBias] = {(True,) * 3: "qkv", (True, False, True): "qv", (False,) * 3: "none"}


def tower(name: str) -> tuple[VisionTransformerConfig, State]:
    """The architecture and the tensors in the files of a folder or a hub's repository."""
    settings = _settings(name)
    with loading(f"hf:{name}"):
        file = next((file for file in map(lambda file: _file(name, file), WEIGHTS) if file is not None), None)
        if file is None:
            raise UserError(f"hf:{name} has none of {', '.join(WEIGHTS)}")
        if file.suffix == ".json":  # on the hub, the shards have to be asked for
            for part in indexed_files(file):
                _file(name, part)
        state = read_state(file)
        pixels = _file(name, "preprocessor_config.json")
    return vision_config(settings, state, read_json(pixels) if pixels else {}), state


def architecture(name: str) -> VisionTransformerConfig:
    """The architecture that its configuration says."""
    settings = _settings(name)
    width = getattr(settings, "projection_dim", None)
    state = {"visual_projection.weight": torch.empty(width, 0)} if width and hasattr(settings, "vision_config") else {}
    return vision_config(settings, state, {})


def vision_config(settings: Any, state: State, pixels: dict[str, Any]) -> VisionTransformerConfig:
    """The architecture that a configuration, its weights and its preprocessor's settings describe."""
    kind = settings.model_type.removesuffix("_vision_model")
    if kind not in FAMILIES:
        raise Unsupported(REASONS.get(kind, f"{kind} is none of {', '.join(FAMILIES)}"))
    family, vision = FAMILIES[kind], getattr(settings, "vision_config", settings)
    if vision.hidden_act not in ACTIVATIONS:
        raise Unsupported(f"its activation is {vision.hidden_act}")
    biases = tuple(
        getattr(vision, f"{name}_bias", getattr(vision, "qkv_bias", True)) for name in ("query", "key", "value")
    )
    if biases not in QKV_BIAS or not (getattr(vision, "proj_bias", True) and getattr(vision, "mlp_bias", True)):
        raise Unsupported("only some of its layers have a bias")
    if not getattr(vision, "vision_use_head", True):
        raise Unsupported("its attention pool is left out (vision_use_head)")
    ratio = getattr(vision, "mlp_ratio", None)
    hidden = vision.intermediate_size if ratio is None else int(vision.hidden_size * ratio)
    swiglu = getattr(vision, "use_swiglu_ffn", False)
    if swiglu:  # two thirds of it, in whole eights
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    theta = getattr(vision, "rope_theta", None)
    patch_size = square(vision.patch_size)
    projection = state.get("visual_projection.weight")
    own: dict[str, Any] = {ours: getattr(vision, theirs) for ours, theirs in SETTINGS.items()}
    own |= {name: value for name, value in family.traits.items() if value is not ANY}
    return VisionTransformerConfig(
        **own
        | {
            "image_size": whole_patches(square(vision.image_size), patch_size),
            "patch_size": patch_size,
            "output_dim": None if projection is None else projection.shape[0],
            "activation": "silu" if swiglu else ACTIVATIONS[vision.hidden_act],
            "mean": three(pixels.get("image_mean") or family.normalisation[0]),
            "std": three(pixels.get("image_std") or family.normalisation[1]),
            "mlp_width": unusual(hidden, vision.hidden_size),
            "registers": getattr(vision, "num_register_tokens", 0),
            "rotary": None if theta is None else Rotary(theta, "centred", halves=True),
            "qkv_bias": QKV_BIAS[biases],
            "gated_mlp": swiglu or getattr(vision, "use_gated_mlp", False),
        }
    )


def unmodified(name: str, image_size: int | None, pretrained: bool) -> Unmodified:
    """A model that `AutoModel` makes: a CLIP's projection, or the class token after the last layer."""
    from transformers import AutoModel

    if image_size is not None:
        raise UserError(f"hf:{name} runs unmodified at its own image size only: leave out --model.image-size")
    settings = _settings(name)
    with loading(f"hf:{name}"):
        load: Any = AutoModel.from_pretrained if pretrained else AutoModel.from_config
        model = load(name if pretrained else settings, trust_remote_code=False, dtype=torch.float32).eval()
        file = _file(name, "preprocessor_config.json")
    pixels = read_json(file) if file else {}
    if not {"image_mean", "image_std"} <= pixels.keys():
        raise UserError(f"hf:{name} has no preprocessor_config.json that says how pixels are normalised: add it")
    vision, mean, std = getattr(settings, "vision_config", settings), pixels["image_mean"], pixels["image_std"]
    call = f"transformers.AutoModel.from_pretrained({name!r})"
    return Unmodified(model, _class_token, square(vision.image_size), three(mean), three(std), call)


def _class_token(model: Any, pixels: Tensor) -> Tensor:
    if hasattr(model, "get_image_features"):
        return _features(model.get_image_features(pixel_values=pixels))
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def text_tower(name: str, device: str) -> TextTower:
    """The text tower of a CLIP or SigLIP."""
    from transformers import AutoModel

    settings = _settings(name)
    if settings.model_type not in WITH_TEXT:
        raise UserError(
            f"hf:{name} is of the kind {settings.model_type}, which has no text tower ({', '.join(WITH_TEXT)} have): "
            "train with --model.head-kind linear"
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

    return TextTower(encode, model.logit_scale.detach().exp())


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
    """The configuration; what it asks for is bounded before any model is made of it, and read from its folder alone."""
    from transformers import AutoConfig

    with loading(f"hf:{name}"):
        if (file := _file(name, "config.json")) is not None:
            check_sizes(read_json(file), str(file))
        for index in Path(name).glob("*.index.json"):
            indexed_files(index)
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
    config, state = class_position(model.transformer.config, model.transformer.state_dict())
    kind, prefix, naming, settings = _kind(config, isinstance(model.head, LinearClassifier))
    state = naming.to_theirs(state)
    state = {name if name.startswith("visual_projection.") else prefix + name: t for name, t in state.items()}
    if kind.startswith("DINOv3"):
        state["embeddings.mask_token"] = torch.zeros(1, 1, config.width)
    elif kind.startswith("Dinov2"):
        state["embeddings.mask_token"] = torch.zeros(1, config.width)
    inside = kind.endswith("ForImageClassification")
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


def _kind(config: VisionTransformerConfig, linear: bool) -> tuple[str, str, Naming, Any]:
    """The model's class, the prefix of its names, its names, and its configuration."""
    import transformers

    name = next((name for name, family in FAMILIES.items() if fits(config, family.traits)), None)
    hidden = config.mlp_width or 4 * config.width
    settings: dict[str, Any] = {
        **{theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()},
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "intermediate_size": hidden,
    }
    writable = True
    if name == "clip":
        settings["projection_dim"] = config.output_dim or 512
    elif name in ("dinov2", "dinov2_with_registers"):
        del settings["intermediate_size"]
        settings |= {"mlp_ratio": hidden // config.width, "use_swiglu_ffn": config.gated_mlp}
        writable = hidden % config.width == 0
        if config.gated_mlp:
            settings["mlp_ratio"] = ratio = round(1.5 * hidden / config.width)
            writable = config.activation == "silu" and (int(config.width * ratio * 2 / 3) + 7) // 8 * 8 == hidden
    elif name == "dinov3_vit":
        rotary, biases = config.rotary, next(biases for biases, kind in QKV_BIAS.items() if kind == config.qkv_bias)
        writable = rotary == Rotary(rotary.theta if rotary else 1.0, "centred", halves=True)
        settings |= {f"{layer}_bias": bias for layer, bias in zip(("query", "key", "value"), biases, strict=True)}
        settings |= {"use_gated_mlp": config.gated_mlp, "rope_theta": rotary.theta if rotary else 0}
    if config.registers or name == "dinov3_vit":
        settings["num_register_tokens"] = config.registers
    if name is None or not writable:
        raise no_place("Hugging Face", "SigLIP" if config.pool == "attention" else "CLIP, ViT or DINO", config)
    family = FAMILIES[name]
    stem = family.settings.removesuffix("Config")
    kind = f"{stem}Model{'WithProjection' if config.output_dim else ''}"
    prefix = "vision_model." if stem.endswith("Vision") else ""
    if linear and name in ("vit", "ijepa"):
        kind, prefix = f"{stem}ForImageClassification", f"{name}."
    naming = gated(family.naming) if config.gated_mlp else family.naming
    return kind, prefix, naming, getattr(transformers, family.settings)(**settings)
