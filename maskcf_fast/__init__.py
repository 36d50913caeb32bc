"""maskcf_fast: counterfactual masking for robust fine-tuning of vision transformers, as fused ops and a trainer.

Importing it compiles nothing, touches no GPU and loads no data library.
"""

# ruff: noqa: F403, F405

from .explain import explain, record_attention
from .methods import CounterfactualDistiller, MaskStrategy
from .models import CosineClassifier, ImageClassifier, VisionTransformer, VisionTransformerConfig, load_backbone
from .ops import *

__version__ = "0.1.0"

__all__ = [
    "CosineClassifier",
    "CounterfactualDistiller",
    "ImageClassifier",
    "MaskStrategy",
    "VisionTransformer",
    "VisionTransformerConfig",
    "attention_relevance",
    "bias_gelu",
    "counterfactual_refill",
    "drop_tokens",
    "explain",
    "gather_tokens",
    "load_backbone",
    "pack_tokens",
    "patchify",
    "record_attention",
    "refill_patches",
    "relevance_cam",
    "residual_norm",
    "sample_donors",
    "select_patches",
]
