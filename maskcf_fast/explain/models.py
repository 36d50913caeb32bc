"""What must be known of a model that its attention calls do not show: what its score is read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import FLOATS, check_tensor
from ..core.errors import UserError
from ..models import ImageClassifier, VisionTransformer
from .layers import select_layers
from .readout import ReadOut
from .record import record_attention

# Hugging Face's classifiers that read more than prefix tokens. The others are recognised by their gradient.
HUGGING_FACE: dict[str, ReadOut] = {
    "CLIPForImageClassification": "mean",
    "Dinov2ForImageClassification": "class+mean",
    "Dinov2WithRegistersForImageClassification": "class+mean",
    "IJepaForImageClassification": "mean",
    "MetaClip2ForImageClassification": "mean",
    "Siglip2ForImageClassification": "mean",
    "SiglipForImageClassification": "mean",
    "SiglipModel": "attention",
}
TIMM: dict[str, ReadOut] = {"avg": "mean", "map": "attention"}


def explain(
    model: nn.Module | Callable[..., Any],
    images: Tensor | Mapping[str, Any],
    labels: Tensor | None = None,
    *,
    start_layer: int = 0,
    prefix_tokens: int | None = None,
    readout: ReadOut | Tensor | None = None,
) -> Tensor:
    """Relevance of every patch for a label, in a vision transformer as it is.

    The model stays in the mode it is in, keeps its fused attention, and its parameters get no gradients.

    Args:
        model: A classifier of timm, torchvision, open_clip, Hugging Face or this package, or any function of images
            that runs torch's scaled-dot-product attention. Returns logits ``[N, C]`` or an object with ``logits``.
        images: What ``model`` takes, ``[N, 3, S, S]`` and preprocessed in most libraries; or a mapping of all its
            inputs by name, such as a Hugging Face processor returns.
        labels: int64 ``[N]``; the predicted class when None.
        start_layer: First layer that counts, 0 for all; negative counts from the end, as in indexing.
        prefix_tokens: As `AttentionRecord.relevance`; found by itself in most models.
        readout: As `AttentionRecord.relevance`; known for the models of timm and Hugging Face that pool.

    Returns:
        ``[N, L]`` float32, in reading order, not normalised.

    Raises:
        TypeError: The model returns no logits.
        ValueError: As `AttentionRecord.relevance`.
    """
    return explained(model, images, labels, start_layer, prefix_tokens, readout)[0]


def explained(
    model: nn.Module | Callable[..., Any],
    images: Tensor | Mapping[str, Any],
    labels: Tensor | None = None,
    start_layer: int = 0,
    prefix_tokens: int | None = None,
    readout: ReadOut | Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """As `explain`, with the logits ``[N, C]`` (detached) and the rows and columns of patches."""
    inner = _unwrapped(model)
    if labels is None and _gives_features(inner):
        raise UserError(
            f"{type(inner).__name__} has no classifier, so there is no predicted class: pass labels (then a feature is "
            "explained), or a function of the images that returns logits"
        )
    with torch.inference_mode(False), torch.enable_grad(), record_attention() as record:
        record.one_pass = True
        inputs = _outside(images)
        logits = _logits(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))
        labels = logits.detach().argmax(dim=1) if labels is None else _outside(labels)
    readout = known_readout(model) if readout is None else readout
    if prefix_tokens is None and isinstance(known := getattr(inner, "num_prefix_tokens", None), int):  # timm, ours
        prefix_tokens = known
    cam = record.relevance(logits, labels, start_layer=start_layer, prefix_tokens=prefix_tokens, readout=readout)
    return cam, logits.detach(), record.grid


def check_explicable(model: Callable[[Tensor], Any], images: Tensor) -> None:
    """Raise where a model's layers cannot be explained; it and ``images [N, 3, S, S]`` may lie on the meta device.

    Raises:
        ValueError: As `AttentionRecord.relevance`, as far as it depends on no values.
    """
    with torch.enable_grad(), record_attention() as record:
        record.one_pass = True
        logits = _logits(model(images))
    select_layers(record, logits)


def _outside(value: Any) -> Any:
    """What was made under `torch.inference_mode`, as autograd takes it."""
    if isinstance(value, Mapping):
        return {name: _outside(item) for name, item in value.items()}
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _unwrapped(model: Any) -> Any:
    """The model within torch's wrappers: compiled, or one of data parallelism."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _gives_features(model: object) -> bool:
    """Whether a model is known to return features, no logits."""
    library = type(model).__module__.partition(".")[0]
    return isinstance(model, VisionTransformer) or library == "open_clip" or getattr(model, "num_classes", None) == 0


def known_readout(model: object) -> ReadOut | None:
    """What a model's score is read from, where that cannot be seen; None for prefix tokens or unknown models."""
    model = _unwrapped(model)
    backbone = model.backbone if isinstance(model, ImageClassifier) else model
    if isinstance(backbone, VisionTransformer):
        return backbone.config.pool
    library = type(model).__module__.partition(".")[0]
    if library == "timm":
        return TIMM.get(getattr(model, "global_pool", ""))
    if library == "transformers":
        return HUGGING_FACE.get(type(model).__name__)
    if library == "open_clip":
        visual = getattr(model, "visual", model)
        trunk = getattr(visual, "trunk", None)  # a model of timm
        return known_readout(trunk) if trunk else ("mean" if getattr(visual, "pool_type", "") == "avg" else None)
    return None


def _logits(output: Any) -> Tensor:
    """The logits in what a model returned."""
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        check_tensor("the logits that the model returns", logits, ["N", "C"], dtypes=FLOATS)
    else:
        raise TypeError(
            f"the model returns {type(output).__name__} without logits: pass a classifier, or a function of the "
            f"images that returns logits [N, C] (such as image features times text features)"
        )
    return logits
