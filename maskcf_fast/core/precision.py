"""The number format that a model computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .errors import UserError


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a model runs at ``precision``: "fp32" or "tf32", or "bf16" with float32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def casts_kept(device: torch.device, precision: str) -> Iterator[None]:
    """Within, weights that `autocast` has cast stay so from one of its contexts to the next; it is off between them."""
    if precision != "bf16":
        yield
        return
    with autocast(device, precision), no_autocast(device):
        yield


def check_precision(device: torch.device, precision: str) -> None:
    """Raise a UserError if ``device`` has no such precision."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 is of NVIDIA GPUs: fp32 is what this device computes in")


def slow_products(device: torch.device, precision: str) -> str | None:
    """Why products in this precision take many times as long as in float32 on ``device``; None if they do not."""
    if precision != "bf16" or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "this CPU has no instructions for bf16: a step takes many times as long as in fp32"


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Where PyTorch's float32 matrix products, backward passes included, are TF32 ones if that is the ``precision``.

    Their inputs are rounded to 10 bits of mantissa; sums, and the kernels of this package, stay float32.
    """
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
