"""Token-space refill by the compiled extension, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import extension

OPS = extension.ops()


@torch.library.register_fake("maskcf::gather_tokens")
@torch.library.register_fake("maskcf::gather_tokens_backward")
def _fake(tokens: Tensor, mask: Tensor, donors: Tensor) -> Tensor:
    return torch.empty_like(tokens)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    mask, donors = ctx.saved_tensors
    return OPS.gather_tokens_backward(grad_out.contiguous(), mask, donors), None, None


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    mask, donors = ctx.saved_tensors
    return OPS.gather_tokens(grad.contiguous(), mask, donors), None, None  # the ops are each other's transposes


torch.library.register_autograd("maskcf::gather_tokens", _backward, setup_context=_keep)
torch.library.register_autograd("maskcf::gather_tokens_backward", _second_backward, setup_context=_keep)


def gather_tokens(
    tokens: Tensor,  # [N, 1 + L, D]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
) -> Tensor:  # [N, 1 + L, D]
    """``out[n, 0] = tokens[n, 0]``; ``out[n, 1 + p] = tokens[donor if mask[n, p] else n, 1 + p]``."""
    return OPS.gather_tokens(tokens.contiguous(), mask.contiguous(), donors.contiguous())
