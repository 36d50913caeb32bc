"""Attention relevance (Chefer et al.) as one row carried from the last layer to the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_batch, check_tensor
from ...core.precision import no_autocast
from ..dispatch import define, implementation
from . import reference
from .limits import lacks as lacks

define(reference.attention_relevance)


def attention_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    relevance: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """One layer of the relevance recurrence, for attention of which no map was kept.

    ``r'[j] = r[j] + sum_i r[i] * mean_h max(0, P_h[i, j] * (dO_h V_h^T)[i, j])`` with
    ``P = softmax(q k^T * scale)``. Since ``dO V^T`` is the gradient with respect to the attention map, this is
    the class token's row of Chefer et al.'s ``R <- R + A R``, taken from the last layer to the first, and it
    needs only what any fused attention has: its inputs and the gradient at its output.

    Source: Chefer, Gur, Wolf, "Generic Attention-model Explainability", ICCV 2021.

    Args:
        q: Queries ``[N, H, Tq, d]``, any float dtype; ``Tq = T``, or 1 when only the class token's row counts
            (the last layer of a model that reads out the class token).
        k: Keys ``[N, H, T, d]``.
        v: Values ``[N, H, T, d]``.
        grad_out: Gradient of the explained score at the attention output (before the output projection),
            like ``q``.
        relevance: Row carried from the layer above, ``[N, T]`` float; None starts at the class token (one-hot
            at token 0).
        scale: Softmax scale; ``d ** -0.5`` when None.
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        The row for the layer below, ``[N, T]``, float32 (float64 when ``q`` is float64).

    Raises:
        TypeError: An argument is no tensor, is no float tensor, or dtypes differ.
        ValueError: Wrong shapes or devices, or an empty dimension.
    """
    check_tensor("q", q, ["N", "H", "Tq", "d"], dtypes=FLOATS)
    n, h, tq, d = q.shape
    check_tensor("k", k, [n, h, "T", d], dtypes=[q.dtype], device=q.device)
    t = k.shape[2]
    check_tensor("v", v, [n, h, t, d], dtypes=[q.dtype], device=q.device)
    check_tensor("grad_out", grad_out, [n, h, tq, d], dtypes=[q.dtype], device=q.device)
    check_batch("q", q)
    check_batch("k", k)
    if tq not in (1, t):
        raise ValueError(f"q must have Tq = T = {t} queries or 1 (the class token), got Tq={tq}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if relevance is None:
        relevance = torch.zeros(n, t, dtype=wide, device=q.device)
        relevance[:, 0] = 1
    check_tensor("relevance", relevance, [n, t], dtypes=FLOATS, device=q.device)
    scale = d**-0.5 if scale is None else float(scale)
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    run = implementation(reference.attention_relevance, impl, q.device, (q.dtype, d), dtype=q.dtype)
    q, k, v, grad_out, relevance = (x.detach() for x in (q, k, v, grad_out, relevance.to(wide)))
    with no_autocast(q.device):
        return run(q, k, v, grad_out, relevance, scale)


def relevance_cam(
    taps: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    *,
    start_layer: int = 0,
    scale: float | None = None,
    pooled: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The relevance of every patch for what is read out, from all layers of a transformer.

    Args:
        taps: One entry per layer, first layer first, each beginning with ``q, k, v`` as
            `attention_relevance` takes them (such as the taps of `VisionTransformer.encode`).
        grads: Gradient of the explained score at each layer's attention output, same order.
        start_layer: First layer that counts, 0 for all; negative counts from the end, as in indexing.
        scale: Softmax scale; ``d ** -0.5`` when None.
        pooled: The last entry is an attention pool, and all tokens are patches. Its one query is no token: the row
            starts as what the query takes from each patch, instead of at the class token.
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        ``[N, L]`` float32, ``L = T - 1`` (the class token's own relevance is left out), or T where ``pooled``. Not
        normalised.

    Raises:
        ValueError: No layers, unequal counts, a ``start_layer`` outside the model, or a pool of several queries; and
            as `attention_relevance`.
    """
    depth = len(taps)
    if depth == 0 or depth != len(grads):
        raise ValueError(f"taps and grads must have one entry per layer, got {depth} and {len(grads)}")
    if not -depth <= start_layer < depth:
        raise ValueError(f"start_layer must lie in [{-depth}, {depth - 1}], got {start_layer}")
    row: Tensor | None = None
    for layer in reversed(range(start_layer % depth, depth)):
        q, k, v = taps[layer][:3]
        if pooled and row is None:
            row = pool_row(q, k, v, grads[layer], scale)
        else:
            row = attention_relevance(q, k, v, grads[layer], row, scale=scale, impl=impl)
    assert row is not None  # depth > 0
    return row if pooled else row[:, 1:]


def pool_row(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: float | None) -> Tensor:
    """What a single query that is no token takes from each token, ``[N, T]``: ``mean over heads of max(0, P * dP)``.

    The map of one query is small.
    """
    if q.shape[2] != 1:
        raise ValueError(f"an attention pool has one query, got Tq={q.shape[2]}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, grad_out = (x.detach().to(wide) for x in (q, k, v, grad_out))
    with no_autocast(q.device):
        weights = reference.attention_weights(q, k, v, grad_out, q.shape[-1] ** -0.5 if scale is None else scale)
    return weights[:, 0]
