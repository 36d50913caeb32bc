"""Models of other libraries by name, ``LIBRARY:MODEL``: the one place that parses it and calls the library's module."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from ..core.errors import UserError
from ..core.names import did_you_mean
from ..core.optional import need
from .config import VisionTransformerConfig, preset
from .libraries import Classifier, TextTower, Unmodified
from .naming import State
from .vit import VisionTransformer
from .weights import check_holds, load_backbone

# What a library is called in names → the module here that knows it, its own module, and how its models are named.
LIBRARIES = {
    "open_clip": ("open_clip", "open_clip", "open_clip:MODEL/PRETRAINED"),
    "hf": ("hugging_face", "transformers", "hf:ID_OR_FOLDER"),
    "timm": ("timm", "timm", "timm:MODEL.TAG"),
    "torchvision": ("torchvision", "torchvision", "torchvision:MODEL"),
    "onnx": ("onnx", "onnx", ""),  # written only
}


def load_source(name: str, image_size: int | None = None) -> tuple[VisionTransformerConfig, State]:
    """The architecture and weights of a vision tower, as its own library defines them.

    Args:
        name: ``open_clip:MODEL/PRETRAINED`` (or ``open_clip:hf-hub:ID``, ``open_clip:local-dir:FOLDER``),
            ``hf:ID_OR_FOLDER`` (CLIP, SigLIP, ViT, DINOv2) or ``timm:MODEL.TAG`` (or ``timm:hf-hub:ID``,
            ``timm:local-dir:FOLDER``).
        image_size: Side of the images in pixels, a multiple of the patch's; by default the model's own.

    Returns:
        The architecture, and the library's tensors as `load_backbone` reads them, which resamples the positions.

    Raises:
        ImportError: The library is not installed.
        ValueError: Unknown library or model (the nearest is suggested), a model that the compact vision transformer
            cannot express (with the reason), weights that cannot be had, or a size that the patch does not divide.
    """
    config, state = _call(name, "tower")
    check_holds(config, sum(tensor.numel() for tensor in state.values()), name)
    return config.resized(image_size), state


def load_architecture(name: str, image_size: int | None = None) -> VisionTransformerConfig:
    """The architecture of a preset, or of what ``name`` stands for, without its weights; else as `load_source`."""
    config = preset(name) if ":" not in name else _call(name, "architecture")
    return config.resized(image_size)


def load_named(name: str, image_size: int | None = None) -> VisionTransformer:
    """The vision transformer that ``name`` stands for, with its weights; arguments and errors as `load_source`."""
    config, state = load_source(name, image_size)
    return load_backbone(VisionTransformer(config), state)


def load_unmodified(name: str, image_size: int | None = None, *, pretrained: bool = True) -> Unmodified:
    """The library's own module, unmodified and in eval mode, as what gives features.

    Args:
        name: As `load_source` takes it.
        image_size: Side of the images in pixels, where the library can make the model so; by default its own.
        pretrained: Load the weights, or leave them random.

    Raises:
        As `load_classifier`.
    """
    return _call(name, "unmodified", image_size, pretrained)


def load_text_tower(name: str, device: str) -> TextTower:
    """The text tower that belongs to the vision tower of that name.

    Args:
        name: ``open_clip:MODEL/PRETRAINED`` or ``hf:ID_OR_FOLDER`` (CLIP, SigLIP), as `load_source` takes them.
        device: Where it runs.

    Raises:
        ImportError: The library is not installed.
        ValueError: A model without a text tower, or one that cannot be loaded.
    """
    return _call(name, "text_tower", device)


def load_classifier(name: str, *, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Classifier:
    """The library's own module, unmodified and in eval mode, as a classifier.

    Args:
        name: As `load_source` takes it, also ``torchvision:MODEL``.
        pretrained: Load the weights, or leave them random.
        prompts: Sentences that stand for the classes: needed with CLIP-like models, refused with classifiers.
        device: Where the model goes.

    Raises:
        ImportError: The library is not installed.
        ValueError: Unknown library or model (the nearest is suggested), prompts missing or out of place, or weights
            that cannot be had.
    """
    return _call(name, "classifier", pretrained, prompts, device)


def library(name: str) -> ModuleType:
    """The module here that knows a library.

    Raises:
        ValueError: Unknown library.
    """
    return import_module(f"{__package__}.libraries.{LIBRARIES[name][0]}")


def _call(name: str, function: str, *arguments: Any) -> Any:
    """Call a library's function; what it does not offer is refused with what does."""
    prefix, _, model = name.partition(":")
    able = [known for known in LIBRARIES if hasattr(library(known), function)]
    if prefix not in able or not model:
        forms = [LIBRARIES[known][2] for known in able]
        hint = did_you_mean(prefix, able)
        if function == "text_tower" and prefix in LIBRARIES:
            hint = "; for a model without one, train with --model.head-kind linear"
        kind = {
            "text_tower": "a text tower",
            "classifier": "a classifier",
        }.get(function, "a model")
        raise UserError(f"{kind} is named {', '.join(forms[:-1])} or {forms[-1]}, got {name!r}{hint}")
    need(LIBRARIES[prefix][1])
    return getattr(library(prefix), function)(model, *arguments)
