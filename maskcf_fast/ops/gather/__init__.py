"""Refill in token space: the masked tokens of an image become those of its donors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.checks import check_donors, check_tokens
from ..dispatch import NAMESPACES, define, implementation
from . import reference

_FORWARD, _BACKWARD = define(reference.gather_tokens), define(reference.gather_tokens_backward)


def gather_tokens(tokens: Tensor, mask: Tensor, donors: Tensor, *, prefix: int = 1, impl: str = "auto") -> Tensor:
    """Refill embedded patches instead of pixels.

    Patch embedding, position embedding and a LayerNorm act on each patch alone, and a donor patch keeps its
    position; so for a vision transformer, gathering embedded tokens equals refilling the pixels and embedding
    the result, without the second embedding. Differentiable in ``tokens`` (by `torch.func`, too, with
    ``impl="reference"``).

    Args:
        tokens: ``[N, T, D]``, any float dtype, ``T = prefix + L``.
        mask: ``[N, L]`` bool, True where the token is replaced.
        donors: int64 ``[N]`` (single-fill) or ``[N, L]`` (multi-fill), indices into the batch.
        prefix: Tokens before the patches, which stay: class token and registers, 0 if there are none.
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        A new tensor like ``tokens``. Copies are bit-exact.

    Raises:
        TypeError: An argument is no tensor or has the wrong dtype.
        ValueError: Wrong shapes or devices, an empty batch, a ``prefix`` that leaves no patch, or a donor outside the
            batch (read on the CPU, and on a GPU under ``MASKCF_DEBUG=1``).
    """
    n, num_patches = check_tokens(tokens, mask, prefix)
    check_donors(donors, n, num_patches, tokens.device)
    run = implementation(reference.gather_tokens, impl, tokens.device, dtype=tokens.dtype)
    return run(tokens, mask, donors, prefix)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.prefix = inputs[3]


def _differentiate(op: Any, transpose: Any) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return transpose(grad, *ctx.saved_tensors, ctx.prefix), None, None, None

    torch.library.register_autograd(op, backward, setup_context=_keep)


for _namespace in set(NAMESPACES.values()):  # linear, and each other's transposes
    _differentiate(_FORWARD[_namespace], _BACKWARD[_namespace])
    _differentiate(_BACKWARD[_namespace], _FORWARD[_namespace])
