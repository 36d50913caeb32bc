"""The number format that a model computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a model runs at ``precision``: "fp32", or "bf16" with float32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The context in which tensors on ``device`` keep their dtype, whatever the caller has switched on."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a matrix product with ``tensor`` computes in here: its own, or autocast's."""
    return torch.get_autocast_dtype(tensor.device.type) if _autocasts(tensor.device) else tensor.dtype


def _autocasts(device: torch.device) -> bool:
    return _can_autocast(device.type) and torch.is_autocast_enabled(device.type)


def _can_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# A constant while tracing, as in ops/dispatch.py: torch 2.11 cannot trace into it.
_can_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
