"""Models of other libraries by name: their architecture and weights, for the compact vision transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.names import did_you_mean
from .architectures import hugging_face_config, open_clip_config, timm_config
from .config import VisionTransformerConfig
from .layouts import State
from .vit import VisionTransformer
from .weights import load_backbone, read_state

FORMS = "open_clip:MODEL/PRETRAINED, hf:ID_OR_FOLDER or timm:MODEL.TAG"


def load_source(name: str) -> tuple[VisionTransformerConfig, State]:
    """The architecture and weights of a vision tower, as its own library defines them.

    Args:
        name: ``open_clip:MODEL/PRETRAINED`` (or ``open_clip:hf-hub:ID``, ``open_clip:local-dir:FOLDER``),
            ``hf:ID_OR_FOLDER`` (CLIP, SigLIP, ViT, DINOv2) or ``timm:MODEL.TAG`` (or ``timm:hf-hub:ID``,
            ``timm:local-dir:FOLDER``).

    Returns:
        The architecture, and the library's tensors as `load_backbone` reads them.

    Raises:
        ImportError: The library is not installed.
        ValueError: Unknown library or model (the nearest is suggested), a model that the compact vision transformer
            cannot express (with the reason), or weights that cannot be had.
    """
    library, _, model = name.partition(":")
    loaders = {"open_clip": _open_clip, "hf": _hugging_face, "timm": _timm}
    if library not in loaders or not model:
        raise UserError(f"a model is named {FORMS}, got {name!r}{did_you_mean(library, loaders)}")
    try:
        return loaders[library](model)
    except ImportError as error:
        package = {"open_clip": "open_clip_torch", "hf": "transformers", "timm": "timm"}[library]
        raise ImportError(
            f"{name} needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from error
    except (OSError, RuntimeError) as error:  # the libraries' and the hub's own
        raise UserError(f"{name} cannot be loaded: {error}") from error


def load_named(name: str) -> VisionTransformer:
    """The vision transformer that ``name`` stands for, with its weights; arguments and errors as `load_source`."""
    config, state = load_source(name)
    return load_backbone(VisionTransformer(config), state)


def open_clip_model(name: str, **options: Any) -> Any:
    """An open_clip model by the name that follows ``open_clip:``, with the activation its weights were trained with.

    open_clip itself only warns where the two differ, as for ``ViT-B-32/openai``.
    """
    import open_clip

    if name.startswith(("hf-hub:", "local-dir:")):
        return open_clip.create_model(name, weights_only=True, **options).eval()
    model, _, tag = name.partition("/")
    if model not in open_clip.list_models():
        raise UserError(f"open_clip has no model {model!r}{did_you_mean(model, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        known = f"one of {', '.join(tags)}" if tags else "weights, of which it has none"
        raise UserError(f"open_clip:{model}/PRETRAINED needs {known}, got {tag!r}{did_you_mean(tag, tags)}")
    quick = bool((open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    return open_clip.create_model(model, tag, force_quick_gelu=quick, weights_only=True, **options).eval()


def _open_clip(name: str) -> tuple[VisionTransformerConfig, State]:
    visual = open_clip_model(name).visual
    return open_clip_config(visual), visual.state_dict()


def _timm(name: str) -> tuple[VisionTransformerConfig, State]:
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        if not timm.is_model(name):
            known = timm.list_models("*vit*") + timm.list_models("*deit*")
            raise UserError(f"timm has no model {name!r}{did_you_mean(name.partition('.')[0], known)}")
        if not timm.is_model_pretrained(name):
            tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
            raise UserError(f"timm has no weights for {name!r}; there are {', '.join(tags) or 'none for this model'}")
    model = timm.create_model(name, pretrained=True).eval()
    return timm_config(model), model.state_dict()


def _hugging_face(name: str) -> tuple[VisionTransformerConfig, State]:
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    state = _hugging_face_state(name)
    file = _file(name, "preprocessor_config.json")
    pixels = json.loads(file.read_text()) if file else {}
    return hugging_face_config(settings, state, pixels), state


def _file(name: str, file: str) -> Path | None:
    """A file of a local folder or of a hub repository, or None where there is no such file."""
    from transformers.utils import cached_file

    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _hugging_face_state(name: str) -> State:
    if whole := _file(name, "model.safetensors"):
        return read_state(whole)
    if index := _file(name, "model.safetensors.index.json"):
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = {part: _file(name, part) for part in parts}
        if missing := [part for part, file in files.items() if file is None]:
            raise UserError(f"hf:{name} lacks {missing[0]}, which its index names")
        return {k: t for file in files.values() if file is not None for k, t in read_state(file).items()}
    if pickled := _file(name, "pytorch_model.bin"):
        return read_state(pickled)
    raise UserError(f"hf:{name} has neither model.safetensors nor pytorch_model.bin")
