"""Vision transformers, heads, and loading weights."""

from .head import CosineClassifier, ImageClassifier
from .vit import PRESETS, Tap, VisionTransformer, VisionTransformerConfig, preset
from .weights import load_backbone

__all__ = [
    "PRESETS",
    "CosineClassifier",
    "ImageClassifier",
    "Tap",
    "VisionTransformer",
    "VisionTransformerConfig",
    "load_backbone",
    "preset",
]
