"""Text towers of other libraries: what zero-shot heads are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UserError
from .sources import open_clip_model


@dataclass(frozen=True)
class TextTower:
    """The part of a model that reads prompts.

    Attributes:
        encode: Prompts to features ``[prompts, D]`` of any float dtype, not normalised.
        scale: What the model multiplies cosines with. SigLIP's bias, the same for all classes, is left out.
    """

    encode: Callable[[list[str]], Tensor]
    scale: float


def load_text_tower(name: str, device: str) -> TextTower:
    """The text tower that belongs to the vision tower of that name.

    Args:
        name: ``open_clip:MODEL/PRETRAINED`` or ``hf:ID_OR_FOLDER`` (CLIP, SigLIP), as `load_source` takes them.
        device: Where it runs.

    Raises:
        ImportError: The library is not installed.
        ValueError: A model without a text tower, or one that cannot be loaded.
    """
    library, _, model = name.partition(":")
    loaders = {"open_clip": _open_clip, "hf": _hugging_face}
    if library not in loaders or not model:
        raise UserError(
            f"{name} has no text tower here: those of open_clip:MODEL/PRETRAINED and hf:ID_OR_FOLDER can be used; for "
            "a model without one, train with --model.head-kind linear"
        )
    try:
        return loaders[library](model, device)
    except ImportError as error:
        package = {"open_clip": "open_clip_torch", "hf": "transformers"}[library]
        raise ImportError(
            f"the text tower of {name} needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from error
    except (OSError, RuntimeError) as error:  # the libraries' and the hub's own
        raise UserError(f"{name} cannot be loaded: {error}") from error


def _open_clip(name: str, device: str) -> TextTower:
    import open_clip

    clip = open_clip_model(name, device=device)
    tokenizer = open_clip.get_tokenizer(name if ":" in name else name.partition("/")[0])
    return TextTower(lambda prompts: clip.encode_text(tokenizer(prompts).to(device)), _exp(clip.logit_scale))


def _hugging_face(name: str, device: str) -> TextTower:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if settings.model_type not in ("clip", "siglip"):
        raise UserError(
            f"hf:{name} is of the kind {settings.model_type}, which has no text tower (clip and siglip have): train "
            "with --model.head-kind linear"
        )
    model = AutoModel.from_pretrained(name, trust_remote_code=False, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    siglip = settings.model_type == "siglip"
    options = {"truncation": True, "max_length": settings.text_config.max_position_embeddings, "return_tensors": "pt"}

    def encode(prompts: list[str]) -> Tensor:
        if siglip:  # trained on lower case, padded to the full length, and on the padding as well: without a mask
            tokens = tokenizer([prompt.lower() for prompt in prompts], padding="max_length", **options)
            tokens = {"input_ids": tokens["input_ids"]}
        else:
            tokens = tokenizer(prompts, padding=True, **options)
        out = model.get_text_features(**{key: value.to(device) for key, value in tokens.items()})
        return out if isinstance(out, Tensor) else out.pooler_output

    return TextTower(encode, _exp(model.logit_scale))


def _exp(log: Tensor) -> float:
    return float(log.detach().exp())
