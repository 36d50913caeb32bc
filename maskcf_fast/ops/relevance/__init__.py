"""Attention relevance (Chefer et al.) as one row carried from the last layer to the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_batch, check_int, check_number, check_sequence, check_tensor, shown
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
    scale = d**-0.5 if scale is None else check_number("scale", scale)
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
    prefix: int = 1,
    readout: str | Tensor = "class",
    impl: str = "auto",
) -> Tensor:
    """The relevance of every patch for what is read out, from all layers of a transformer.

    Args:
        taps: One entry per layer, first layer first, each beginning with ``q, k, v`` as
            `attention_relevance` takes them (such as the taps of `VisionTransformer.encode`).
        grads: Gradient of the explained score at each layer's attention output, same order.
        start_layer: First layer that counts, 0 for all; negative counts from the end, as in indexing.
        scale: Softmax scale; ``d ** -0.5`` when None.
        prefix: Tokens before the patches: class token and registers, 0 if there are none.
        readout: Where the row starts. ``"class"``: at token 0. ``"mean"``: at all patches alike. ``"attention"``: the
            last entry is an attention pool, whose one query is no token; what it takes from each is the row. Or
            weights ``[T]``: at the tokens by these.
        impl: ``"auto"``, or the name of an implementation.

    Returns:
        ``[N, L]`` float32 (float64 when ``q`` is float64), ``L = T - prefix``: what the layers hand on to each patch,
        without what the row started with. Not normalised.

    Raises:
        TypeError: ``start_layer`` or ``prefix`` is no int; and as `attention_relevance`.
        ValueError: No layers, unequal counts, a ``start_layer`` outside the model, a ``prefix`` that leaves no patch or
            no class token to read, an unknown ``readout``, or a pool of several queries; and as `attention_relevance`.
    """
    check_sequence("taps", taps)
    check_sequence("grads", grads)
    depth = len(taps)
    if depth == 0 or depth != len(grads):
        raise ValueError(f"taps and grads must have one entry per layer, got {depth} and {len(grads)}")
    for layer, (tap, grad) in enumerate(zip(taps, grads, strict=True)):
        check_sequence(f"taps[{layer}]", tap)
        if len(tap) < 3:
            raise ValueError(f"taps[{layer}] must begin with q, k and v, got {len(tap)} entries")
        names = (f"taps[{layer}][0]", f"taps[{layer}][1]", f"taps[{layer}][2]", f"grads[{layer}]")
        for name, x in zip(names, (*tap[:3], grad), strict=True):
            check_tensor(name, x, ["N", "H", "T", "d"], dtypes=FLOATS)
    check_int("start_layer", start_layer, -depth, depth - 1)
    k = taps[-1][1]
    t = k.shape[2]
    check_int("prefix", prefix, 0, t - 1, "T - 1")
    weights = torch.zeros(t, device=k.device)
    if isinstance(readout, Tensor):
        check_tensor("readout", readout, [t], dtypes=FLOATS, device=k.device)
        weights = readout
    elif readout == "class":
        if prefix == 0:
            raise ValueError('readout="class" needs a class token, but prefix=0: all tokens are patches')
        weights[0] = 1
    elif readout == "mean":
        weights[prefix:] = 1 / (t - prefix)
    elif readout != "attention":
        raise ValueError(f"readout must be 'class', 'mean', 'attention' or weights, got {shown(readout)}")
    layers = [(tap[0], tap[1], tap[2], grad, scale) for tap, grad in zip(taps, grads, strict=True)]
    start = weights if isinstance(readout, Tensor) or readout != "attention" else None
    return carried(reversed(layers[start_layer % depth :]), start, impl)[:, prefix:]


def carried(
    layers: Iterable[tuple[Tensor, Tensor, Tensor, Tensor, float | None]], start: Tensor | None, impl: str = "auto"
) -> Tensor:
    """What layers hand on to each token, ``[N, T]``: the row, without what it started with.

    Args:
        layers: ``q, k, v, grad_out, scale`` of each, the last layer first.
        start: ``[T]``, weights by which the read-out takes the last layer's tokens. None for an attention pool, which
            is then the first of ``layers``.
        impl: As for `attention_relevance`.
    """
    row: Tensor | None = None
    for q, k, v, grad_out, scale in layers:
        if row is not None:
            row = attention_relevance(q, k, v, grad_out, row, scale=scale, impl=impl)
        elif start is not None:
            row = attention_relevance(q, k, v, grad_out, start.expand(len(q), -1), scale=scale, impl=impl)
        else:
            row = pool_row(q, k, v, grad_out, scale)
    assert row is not None  # there is a layer
    return row if start is None else row - start.to(row.dtype)


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
