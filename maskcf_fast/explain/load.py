"""Models of other libraries by name, with their own preprocessing, for the gallery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError
from ..core.names import did_you_mean
from .models import known_readout
from .readout import ReadOut

FORMS = "timm:NAME, torchvision:NAME, open_clip:NAME/PRETRAINED or hf:ID_OR_DIR"


@dataclass(frozen=True)
class Loaded:
    """A classifier and what belongs to it."""

    logits: Callable[[Tensor], Any]  # preprocessed images [N, 3, S, S] → logits [N, C]
    transform: Callable[[Any], Tensor]  # RGB picture → [3, S, S], normalised
    mean: Sequence[float]
    std: Sequence[float]
    classes: Mapping[int, str]  # names, where they are known
    readout: ReadOut | None


def load(name: str, *, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Loaded:
    """A model as ``library:name`` names it, in eval mode.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``open_clip:NAME/PRETRAINED`` or ``hf:ID_OR_DIR``.
        pretrained: Load the weights, or leave them random.
        prompts: Sentences that stand for the classes: needed with CLIP-like models, refused with classifiers.
        device: Where the model goes.

    Raises:
        ImportError: The library is not installed.
        ValueError: Unknown library or model (the nearest is suggested), prompts missing or out of place, or weights
            that cannot be had.
    """
    library, _, model = name.partition(":")
    loaders = {"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip, "hf": _hugging_face}
    if library not in loaders or not model:
        raise UserError(f"the model must be given as {FORMS}, got {name!r}{did_you_mean(library, loaders)}")
    try:
        return loaders[library](model, pretrained, prompts, device)
    except (OSError, RuntimeError) as error:  # the libraries' and the hub's own
        raise UserError(f"{name} cannot be loaded: {error}") from error


def _no_prompts(prompts: Sequence[str]) -> None:
    if prompts:
        raise UserError("--prompts are for CLIP-like models (open_clip:, hf:); this one has classes of its own")


def _timm(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Loaded:
    import timm

    _no_prompts(prompts)
    if not (name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name)):
        raise UserError(f"timm has no model {name!r}{did_you_mean(name.partition('.')[0], timm.list_models())}")
    model = timm.create_model(name, pretrained=pretrained).to(device).eval()
    data = timm.data.resolve_model_data_config(model)
    classes: dict[int, str] = {}
    if model.num_classes == 1000:
        info = timm.data.ImageNetInfo()
        classes = {i: info.index_to_description(i) for i in range(1000)}
    transform = timm.data.create_transform(**data, is_training=False)
    return Loaded(model, transform, data["mean"], data["std"], classes, known_readout(model))


def _torchvision(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Loaded:
    from torchvision import models

    _no_prompts(prompts)
    if name not in models.list_models():
        raise UserError(f"torchvision has no model {name!r}{did_you_mean(name, models.list_models())}")
    weights = models.get_model_weights(name)["DEFAULT"]
    transform = weights.transforms()
    model = models.get_model(name, weights=weights if pretrained else None).to(device).eval()
    classes = dict(enumerate(weights.meta.get("categories", ())))
    return Loaded(model, transform, transform.mean, transform.std, classes, known_readout(model))


def _zero_shot(image: Callable[[Tensor], Tensor], text: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    directions, factor = F.normalize(text, dim=-1).detach(), scale.detach().exp()
    return lambda images: factor * F.normalize(image(images), dim=-1) @ directions.T


def _open_clip(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Loaded:
    import open_clip

    name, tag = (name, "") if name.startswith("hf-hub:") else (name.partition("/")[0], name.partition("/")[2])
    if not name.startswith("hf-hub:"):
        if name not in open_clip.list_models():
            raise UserError(f"open_clip has no model {name!r}{did_you_mean(name, open_clip.list_models())}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained and tag not in tags:
            raise UserError(f"open_clip:{name}/PRETRAINED needs one of {', '.join(tags)}{did_you_mean(tag, tags)}")
    if not prompts:
        raise UserError('an open_clip model has no classes: give --prompts "a photo of a cat" "a photo of a dog" …')
    model, _, transform = open_clip.create_model_and_transforms(
        name, pretrained=tag if pretrained and tag else None, device=device
    )
    model.eval()
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer(name)(list(prompts)).to(device))
    logits = _zero_shot(model.encode_image, text, model.logit_scale)
    mean, std = model.visual.image_mean, model.visual.image_std
    return Loaded(logits, transform, mean, std, dict(enumerate(prompts)), known_readout(model))


def _hugging_face(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Loaded:
    import transformers

    kind: Any = transformers.AutoModel if prompts else transformers.AutoModelForImageClassification
    if pretrained:
        model, report = kind.from_pretrained(name, output_loading_info=True)
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise UserError(
                f"the weights of {name} lack {missing}: no image classifier. For a CLIP-like model, give --prompts"
            )
    else:
        model = kind.from_config(transformers.AutoConfig.from_pretrained(name))
    model.to(device).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    logits, classes = model, dict(model.config.id2label)
    if prompts:
        if not hasattr(model, "get_text_features"):
            raise UserError(f"{name} has no text encoder: --prompts are for CLIP-like models")
        tokens = transformers.AutoTokenizer.from_pretrained(name)(list(prompts), padding=True, return_tensors="pt")
        with torch.no_grad():
            text = _features(model.get_text_features(**tokens.to(device)))
        logits = _zero_shot(lambda x: _features(model.get_image_features(pixel_values=x)), text, model.logit_scale)
        classes = dict(enumerate(prompts))
    return Loaded(
        logits,
        lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0],
        processor.image_mean,
        processor.image_std,
        classes,
        known_readout(model),
    )


def _features(output: Any) -> Tensor:
    """Features are returned as such, or in an object, as the version of the library has it."""
    return output if isinstance(output, Tensor) else output.pooler_output
