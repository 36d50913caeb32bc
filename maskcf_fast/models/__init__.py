"""Vision transformers, heads, and loading weights."""

from .head import HEADS, CosineClassifier, ImageClassifier, LinearClassifier
from .sources import load_source
from .vit import PRESETS, Tap, VisionTransformer, VisionTransformerConfig, preset
from .weights import load_backbone

__all__ = [
    "HEADS",
    "PRESETS",
    "CosineClassifier",
    "ImageClassifier",
    "LinearClassifier",
    "Tap",
    "VisionTransformer",
    "VisionTransformerConfig",
    "load_backbone",
    "load_source",
    "preset",
]
