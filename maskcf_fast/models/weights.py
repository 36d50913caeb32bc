"""Loading weights from safetensors: our own, Hugging Face CLIP vision models, and open_clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .vit import VisionTransformer

OPEN_CLIP = [
    (r"^conv1\.weight$", "patch_weight"),
    (r"^positional_embedding$", "position_embedding"),
    (r"^proj$", "projection"),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.out."),
    (r"\.mlp\.c_fc\.", ".fc."),
    (r"\.mlp\.c_proj\.", ".proj."),
]
HUGGING_FACE = [
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.patch_embedding\.weight$", "patch_weight"),
    (r"^embeddings\.position_embedding\.weight$", "position_embedding"),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"^visual_projection\.weight$", "projection"),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".fc."),
    (r"\.mlp\.fc2\.", ".proj."),
]


def load_backbone(model: VisionTransformer, weights: str | Path | Mapping[str, Tensor]) -> VisionTransformer:
    """Load the weights of a CLIP vision tower into ``model``.

    Recognised by their names: this package's own weights, a Hugging Face ``CLIPModel`` or
    ``CLIPVisionModel(WithProjection)``, and an open_clip model or its ``visual`` part. Text towers and heads in
    the same file are passed over. Only safetensors files are read: they cannot execute code.

    Args:
        model: The model to fill, in place.
        weights: Path of a ``.safetensors`` file, or a state dict.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a readable safetensors file, an unknown layout, or an architecture other than the
            model's; every missing, unexpected and misshapen tensor is named.
    """
    state = _read(Path(weights)) if isinstance(weights, str | Path) else dict(weights)
    state = _translate(state)
    own = model.state_dict()
    if model.projection is None:
        state.pop("projection", None)
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
        raise ValueError(f"the weights{source} are of another architecture than {model.config}:\n  {shown}")
    model.load_state_dict(state)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}): convert or download it again") from error


def _translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to this package's names; the layout is told by the prefix and by the class embedding's name."""
    if any(name.startswith("backbone.") for name in state):  # an ImageClassifier
        return _strip(state, "backbone.")
    if any(name.startswith("visual.") for name in state):
        return _rename(_strip(state, "visual."), OPEN_CLIP)
    if "vision_model.embeddings.class_embedding" in state:
        vision = _strip(state, "vision_model.")
        if "visual_projection.weight" in state:
            vision["visual_projection.weight"] = state["visual_projection.weight"]
        return _pack(_rename(vision, HUGGING_FACE))
    if "embeddings.class_embedding" in state:
        return _pack(_rename(state, HUGGING_FACE))
    if "conv1.weight" in state:
        return _rename(state, OPEN_CLIP)
    if "patch_weight" in state:
        return state
    raise ValueError(
        "unknown weight layout: expected this package's, Hugging Face CLIP's or open_clip's names, "
        f"got {', '.join(sorted(state)[:4]) or 'no tensors'}, …"
    )


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _rename(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


def _pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face keeps q, k and v apart, the projection transposed, and once stored position ids."""
    state.pop("embeddings.position_ids", None)
    if "projection" in state:
        state["projection"] = state["projection"].T.contiguous()
    for name in [name for name in state if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state
