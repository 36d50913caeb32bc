"""Vision transformers, heads, and loading weights."""

from .backbone import Backbone, Shape
from .blocks import Tap
from .config import PRESETS, Rotary, VisionTransformerConfig, preset
from .head import HEADS, CosineClassifier, ImageClassifier, LinearClassifier
from .pool import PoolTap
from .sources import load_source
from .vit import VisionTransformer
from .weights import load_backbone

__all__ = [
    "HEADS",
    "PRESETS",
    "Backbone",
    "CosineClassifier",
    "ImageClassifier",
    "LinearClassifier",
    "PoolTap",
    "Rotary",
    "Shape",
    "Tap",
    "VisionTransformer",
    "VisionTransformerConfig",
    "load_backbone",
    "load_source",
    "preset",
]
