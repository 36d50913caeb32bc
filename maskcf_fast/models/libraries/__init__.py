"""Other libraries' models: one module each, all of them under the same function names.

``tower(model)`` gives the architecture and weights of the vision tower, ``text_tower(model, device)`` what reads
prompts, ``classifier(model, pretrained, prompts, device)`` the unmodified module as a classifier, and ``write(model,
classes, folder)`` a checkpoint that the library loads. `maskcf_fast.models.sources` calls the first three by name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.files import read_json
from ..config import VisionTransformerConfig

PT = {"format": "pt"}  # Hugging Face refuses safetensors files that do not say so
# What every library takes as a number.
FREE = ("image_size", "patch_size", "width", "depth", "heads", "activation", "mean", "std", "mlp_width", "eps")


@dataclass(frozen=True)
class TextTower:
    """The part of a model that reads prompts.

    Attributes:
        encode: Prompts to features ``[prompts, D]`` of any float dtype, not normalised.
        scale: ``[]``, what the model multiplies cosines with. SigLIP's bias, the same for all classes, is left out.
    """

    encode: Callable[[list[str]], Tensor]
    scale: Tensor


@dataclass(frozen=True)
class Classifier:
    """An unmodified model as a classifier, and what belongs to it.

    Attributes:
        logits: Preprocessed images ``[N, 3, S, S]`` to logits ``[N, C]``, or an object with ``logits``.
        module: The model.
        transform: RGB picture to ``[3, S, S]``, normalised.
        mean: Per-channel mean of the normalisation.
        std: Per-channel standard deviation.
        classes: Names of the outputs, where they are known.
    """

    logits: Callable[[Tensor], Any]
    module: nn.Module
    transform: Callable[[Any], Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    classes: Mapping[int, str]


@dataclass(frozen=True)
class Unmodified:
    """A model as its library makes it.

    Attributes:
        module: The model.
        features: It and normalised pixels ``[N, 3, S, S]`` to features ``[N, D]``.
        image_size: Side of its images in pixels.
        mean: Per-channel mean of the normalisation.
        std: Per-channel standard deviation.
        call: What makes it in the library.
    """

    module: nn.Module
    features: Callable[[nn.Module, Tensor], Tensor]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    call: str


class Unsupported(UserError):
    """A model that the compact vision transformer cannot express, for this ``reason``."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"this model is not supported because {reason}: --model.native False trains it unmodified, if its "
            "attention can be seen"
        )


def zero_shot(image: Callable[[Tensor], Tensor], text: TextTower, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """CLIP's logits of images for ``prompts``."""
    directions = F.normalize(text.encode(list(prompts)).detach(), dim=-1)
    return lambda images: text.scale * F.normalize(image(images), dim=-1) @ directions.T


def refuse_prompts(prompts: Sequence[str]) -> None:
    """Raise where a classifier is given prompts."""
    if prompts:
        raise UserError("--prompts are for CLIP-like models (open_clip:, hf:); this one has classes of its own")


@contextmanager
def loading(name: str) -> Iterator[None]:
    """What a library raises for files that are missing, damaged or of other sizes becomes a message with the name."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:  # the libraries', the hub's, their parsers': there is no end to them
        raise UserError(f"{name} cannot be loaded: {str(error) or type(error).__name__}") from error


def check_settings(model: str, file: str) -> None:
    """Raise where a folder's settings ask for sizes that no model has, or to run code, before the library obeys.

    Args:
        model: ``local-dir:FOLDER`` or ``hf-hub:ID``; of others, the library knows the sizes itself.
        file: Name of the file with its settings.
    """
    kind, _, place = model.partition(":")
    if kind == "local-dir":
        path = Path(place) / file
    elif kind in ("hf-hub", "hf_hub"):
        from huggingface_hub import hf_hub_download

        name, _, revision = place.partition("@")
        path = Path(hf_hub_download(name, file, revision=revision or None))
    else:
        return
    if path.is_file():
        check_sizes(read_json(path), str(path))


def check_sizes(settings: Any, source: str, key: str = "") -> None:
    """Raise where a number in ``settings``, nested as they may be, is beyond any model's."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            check_sizes(value, source, str(key))
    elif isinstance(settings, list):
        for value in settings:
            check_sizes(value, source, key)
    elif key == "trust_remote_code" and settings:
        raise UserError(f"{source} asks to run code of its own, which is never done here")
    elif isinstance(settings, int | float):
        most = 1000 if re.search(r"depth|layers$", key) else 2**20
        if not settings <= most:
            raise UserError(f"{source} says {key}={settings}, of at most {most}: no such model can be built")


ANY = object()  # a trait in which models of a family differ
PLAIN: dict[str, Any] = {  # of a ViT as it first was
    **{field.name: field.default for field in fields(VisionTransformerConfig) if field.name not in FREE},
    "output_dim": None,
    "pre_norm": False,
    "patch_bias": True,
}


def fits(config: VisionTransformerConfig, traits: Mapping[str, object]) -> bool:
    """Whether a model has all of ``traits``."""
    return all(value is ANY or getattr(config, name) == value for name, value in traits.items())


def no_place(library: str, kinds: str, config: VisionTransformerConfig) -> UserError:
    """The error for a model that a library has no class for."""
    usual = {**PLAIN, "activation": None, "eps": None, "mlp_width": None}
    traits = ", ".join(f"{name}={getattr(config, name)}" for name in usual if getattr(config, name) != usual[name])
    return UserError(f"{library} has no {kinds} with {traits}: choose another --to")


def is_exactly(module: object, kind: type) -> bool:
    """Whether it is of this very class: a subclass may compute something else."""
    return type(module) is kind


def unusual(hidden: int, width: int) -> int | None:
    """An MLP's hidden dimension, where it is not the usual one."""
    return None if hidden == 4 * width else hidden


def square(size: Any) -> int:
    """The side of a square size."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[1]:
        raise Unsupported(
            f"its images or patches are not square, but {sides[0]}×{sides[1]}; --model.image-size N asks its library "
            "for a square"
        )
    return int(sides[0])


def whole_patches(side: int, patch: int) -> int:
    """The side of the square that is made of whole patches: all that a convolution reads of the image."""
    whole = side // patch * patch
    if whole != side:
        print(
            f"note: this model's patches cover {whole} of {side} pixels; images of {whole} are what it gets",
            file=sys.stderr,
        )
    return whole


def three(values: Any) -> tuple[float, float, float]:
    """One number per channel."""
    if len(values) != 3:
        raise Unsupported(f"its images have {len(values)} channels")
    red, green, blue = (float(v) for v in values)
    return red, green, blue
