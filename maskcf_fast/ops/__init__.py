"""The ops. Each folder holds one: the public function, and its implementations beside it.

``reference.py`` is always there: plain PyTorch, the contract that every other implementation is tested against.
"""

from .bias_gelu import bias_gelu
from .donors import sample_donors
from .drop import drop_tokens, pack_tokens
from .gather import gather_tokens
from .patchify import patchify
from .refill import counterfactual_refill, refill_patches
from .relevance import attention_relevance, relevance_cam
from .residual_norm import residual_norm
from .select import select_patches

__all__ = [
    "attention_relevance",
    "bias_gelu",
    "counterfactual_refill",
    "drop_tokens",
    "gather_tokens",
    "pack_tokens",
    "patchify",
    "refill_patches",
    "relevance_cam",
    "residual_norm",
    "sample_donors",
    "select_patches",
]
