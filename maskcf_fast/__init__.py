"""maskcf_fast: counterfactual masking for robust fine-tuning of vision transformers, as fused ops and a trainer.

Importing it compiles nothing, touches no GPU and loads no data library.
"""

from .explain import explain, record_attention
from .methods import CounterfactualDistiller, MaskStrategy
from .models import CosineClassifier, ImageClassifier, VisionTransformer, VisionTransformerConfig, load_backbone
from .ops import *  # noqa: F403
from .ops import __all__ as _ops

__version__ = "0.1.0"

__all__ = [
    "CosineClassifier",
    "CounterfactualDistiller",
    "ImageClassifier",
    "MaskStrategy",
    "VisionTransformer",
    "VisionTransformerConfig",
    "explain",
    "load_backbone",
    "record_attention",
]
__all__ += _ops
