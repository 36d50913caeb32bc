"""What the compiled ops and Triton's have in common: shapes for tracing, and the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register(namespace: str) -> None:
    """For ``gather_tokens`` and ``gather_tokens_backward`` of a namespace: linear, and each other's transpose."""
    ops = getattr(torch.ops, namespace)
    for name, transpose in (
        ("gather_tokens", ops.gather_tokens_backward),
        ("gather_tokens_backward", ops.gather_tokens),
    ):
        torch.library.register_fake(f"{namespace}::{name}", _fake)
        torch.library.register_autograd(f"{namespace}::{name}", _gradient(transpose), setup_context=_keep)


def _fake(tokens: Tensor, mask: Tensor, donors: Tensor) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradient(transpose: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None, None]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return transpose(grad.contiguous(), *ctx.saved_tensors), None, None

    return backward
