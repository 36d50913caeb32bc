"""Loading weights: this package's own, and those of open_clip, Hugging Face and timm."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.tensors import load_tensors
from .config import VisionTransformerConfig
from .layouts import LAYOUTS, TIMM, State
from .vit import VisionTransformer

PICKLES = (".bin", ".pt", ".pth")


def load_backbone(model: VisionTransformer, weights: str | Path | Mapping[str, Tensor]) -> VisionTransformer:
    """Load the weights of a vision tower into ``model``.

    Recognised by their names: this package's own weights, a Hugging Face ``CLIPModel``,
    ``CLIPVisionModel(WithProjection)``, ``SiglipModel``, ``SiglipVisionModel``, ``ViTModel`` or ``Dinov2Model``, an
    open_clip model or its ``visual`` part, and a timm ViT. Text towers and heads in the same file are passed over. No
    file is read in a way that could execute code.

    Args:
        model: The model to fill, in place.
        weights: Path of a ``.safetensors`` file (or of a pickled state dict), or a state dict.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a readable file, an unknown layout, or an architecture other than the model's; every
            missing, unexpected and misshapen tensor is named.
    """
    state = read_state(Path(weights)) if isinstance(weights, str | Path) else dict(weights)
    state = _translate(state, model.config)
    own = model.state_dict()
    problems = [f"missing {name} {list(own[name].shape)}" for name in own if name not in state]
    problems += [f"unexpected {name} {list(state[name].shape)}" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, the model needs {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        source = f" in {weights}" if isinstance(weights, str | Path) else ""
        shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise UserError(f"the weights{source} are of another architecture than {model.config}:\n  {shown}")
    model.load_state_dict(state)
    return model


def read_state(path: Path) -> State:
    """The tensors in a file, read without executing code.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Neither a complete safetensors file nor a pickle of tensors alone.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix not in PICKLES:
        return load_tensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors and would execute code when loaded: convert it to "
            f"safetensors where you trust it ({str(error).splitlines()[0]})"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {str(name).removeprefix("module."): t for name, t in content.items() if isinstance(t, Tensor)}
    if not state:
        raise UserError(f"{path} holds no state dict")
    return state


def architecture_metadata(config: VisionTransformerConfig) -> dict[str, str]:
    """What is stored beside this package's own weights, so that the file says what it holds."""
    return {"architecture": json.dumps(dataclasses.asdict(config))}


def read_metadata(path: Path) -> dict[str, str]:
    """What is stored in a safetensors file beside its tensors; nothing for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_architecture(path: Path) -> VisionTransformerConfig | None:
    """The architecture that a file of this package's weights names, if it does."""
    stored = read_metadata(path).get("architecture")
    if stored is None:
        return None
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(stored).items()}
        return VisionTransformerConfig(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} names an architecture that this version does not know: {error}") from error


def _translate(state: State, config: VisionTransformerConfig) -> State:
    """Rename to this package's names; the layout is told by its mark."""
    if any(name.startswith("backbone.") for name in state):  # an ImageClassifier
        return _strip(state, "backbone.")
    for layout in LAYOUTS:
        for prefix in layout.prefixes:
            if prefix + layout.marks in state:
                tower = _strip(state, prefix)
                if prefix and "visual_projection.weight" in state:
                    tower["visual_projection.weight"] = state["visual_projection.weight"]
                if layout is TIMM:
                    tower = _without_head(tower, config)
                tower = layout.to_ours(tower)
                if config.output_dim is None:
                    tower.pop("projection", None)
                return tower
    if "patch_weight" in state:
        return state
    raise UserError(
        "unknown weight layout: expected this package's, open_clip's, timm's, or Hugging Face's CLIP, SigLIP, ViT or "
        f"DINOv2 names, got {', '.join(sorted(state)[:4]) or 'no tensors'}, …"
    )


def _without_head(state: State, config: VisionTransformerConfig) -> State:
    """timm's ``head`` is CLIP's projection with a bias of zero, or else a classification head."""
    state = dict(state)
    bias = state.pop("head.bias", None)
    if config.output_dim is None:
        state.pop("head.weight", None)
    elif bias is not None and bool(bias.any()):
        raise UserError("the head in these timm weights has a bias: it is a classifier, no projection of features")
    return state


def _strip(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
