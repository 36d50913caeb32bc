"""torchvision's classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...core.errors import UserError
from ...core.names import did_you_mean
from . import Classifier, loading, refuse_prompts


def classifier(name: str, pretrained: bool, prompts: Sequence[str], device: torch.device) -> Classifier:
    """A classifier with its newest weights' classes and preprocessing."""
    from torchvision import models

    refuse_prompts(prompts)
    if name not in models.list_models():
        raise UserError(f"torchvision has no model {name!r}{did_you_mean(name, models.list_models())}")
    weights = models.get_model_weights(name)["DEFAULT"]
    transform = weights.transforms()
    with loading(f"torchvision:{name}"):
        model = models.get_model(name, weights=weights if pretrained else None).to(device).eval()
    classes = dict(enumerate(weights.meta.get("categories", ())))
    return Classifier(model, model, transform, transform.mean, transform.std, classes)
