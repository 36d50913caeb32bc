"""Attention relevance for the vision transformers of other libraries, unmodified and with fused attention on."""

from .models import explain
from .record import AttentionRecord, record_attention

__all__ = ["AttentionRecord", "explain", "record_attention"]
