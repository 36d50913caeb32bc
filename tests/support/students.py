"""The package's methods, and a student for them."""

import copy

import torch

from maskcf_fast.methods import METHODS
from maskcf_fast.models import Backbone, CosineClassifier, ImageClassifier, VisionTransformer


def own_methods() -> list[str]:
    """Names of the methods that come with the package: a benchmark, once imported, has its own beside them."""
    return [name for name, entry in METHODS.items() if entry.build.__module__.startswith("maskcf_fast.")]


def moved(backbone: Backbone | None = None, classes: int = 5, seed: int = 0) -> tuple[ImageClassifier, ImageClassifier]:
    """A student that has moved away from its teacher, which is frozen."""
    torch.manual_seed(seed)
    backbone = VisionTransformer("tiny") if backbone is None else backbone
    teacher = ImageClassifier(backbone, CosineClassifier(backbone.config.feature_dim, classes))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return student, teacher
