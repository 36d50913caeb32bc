"""Attention relevance in Triton, in the manner of flash attention: no map in memory, only tiles in registers.

Two launches. The first finds, for every query, the maximum ``m`` of its scores and the sum ``l`` of their
exponentials. The second gives each block of keys to one program, which goes through heads and queries, recomputes
the scores, and sums ``r / (l H) * max(0, exp(s - m) * dP)``: since ``l`` is positive, it moves out of the clamp and
into the query's weight. Scores are shifted before they are scaled, as in a softmax, so that the largest is exactly 1.
The order of every sum is fixed.

Keys are the first factor of every product and queries the second: a block of keys stays for all the queries of a
head, in shared memory, and 64 of them are what one tensor-core instruction of the newer GPUs takes.
"""

# mypy: allow-untyped-defs
# (Triton gives a kernel's arguments their types; the comments beside them say which.)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from .._triton import VECTOR_BYTES, on_device_of, power_of_two_in

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # finite, so that times a scale of 0 it is 0
LOG2_E = 1.0 / math.log(2.0)


@triton.jit
def rows_of(
    x,  # [N, H, T, d]
    n,
    h,
    token,  # [BLOCK]
    length,  # T
    stride_n,
    stride_h,
    stride_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
):  # [BLOCK, BLOCK_D], zeros outside
    """Load a block of tokens of one head; the last dimension is dense.

    Strides count in ``UNIT`` elements: so the compiler knows what divides them, and loads as many at once.
    """
    dim = tl.arange(0, BLOCK_D)
    x += (tl.cast(n, tl.int64) * stride_n + tl.cast(h, tl.int64) * stride_h) * UNIT
    pointer = x + (token[:, None] * stride_t * UNIT + dim[None, :])  # 32 bits reach a head's end: see `reachable`
    inside = (token < length)[:, None]
    if D != BLOCK_D:
        inside = inside & (dim < D)[None, :]
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def product(
    a,  # [A, BLOCK_D]
    b,  # [B, BLOCK_D]
    WIDEN: tl.constexpr,
):  # [A, B] float32
    """``a bT``, summed in float32: on the tensor cores in half precision, without TF32 in float32."""
    if WIDEN:  # the interpreter would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def maskcf_softmax(
    q,  # [N, H, Tq, d]
    k,  # [N, H, T, d]
    relevance,  # [N, T] float32
    maximum,  # [N, H, Tq] float32, written
    weight,  # [N, H, Tq] float32, written: r / (l H)
    queries,  # Tq
    keys,  # T
    heads,
    query_blocks,
    scale,  # times log2(e), not negative
    q_n,
    q_h,
    q_t,
    k_n,
    k_h,
    k_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = tl.program_id(0) // query_blocks  # of [N * H]
    n, h = row // heads, row % heads
    i = tl.program_id(0) % query_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_tile = rows_of(q, n, h, i, queries, q_n, q_h, q_t, D, BLOCK_D, UNIT)
    top = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k_tile = rows_of(k, n, h, j, keys, k_n, k_h, k_t, D, BLOCK_D, UNIT)
        if q_tile.dtype == tl.float32:
            # The queries as the second factor stay in shared memory; as the first they would fill the registers.
            scores = tl.trans(product(k_tile, q_tile, WIDEN))
        else:
            scores = product(q_tile, k_tile, WIDEN)
        inside = (j < keys)[None, :]
        higher = tl.maximum(top, tl.max(tl.where(inside, scores, LOWEST), axis=1))
        exponentials = tl.where(inside, tl.exp2((scores - higher[:, None]) * scale), 0.0)
        total = total * tl.exp2((top - higher) * scale) + tl.sum(exponentials, axis=1)
        top = higher
    out = row.to(tl.int64) * queries + i
    r = tl.load(relevance + n.to(tl.int64) * keys + i, mask=i < queries, other=0.0)
    tl.store(maximum + out, top, mask=i < queries)
    tl.store(weight + out, r / (total * heads), mask=i < queries)


@triton.jit
def maskcf_relevance(
    q,  # [N, H, Tq, d]
    k,  # [N, H, T, d]
    v,  # [N, H, T, d]
    grad_out,  # [N, H, Tq, d]
    relevance,  # [N, T] float32
    maximum,  # [N, H, Tq] float32
    weight,  # [N, H, Tq] float32
    out,  # [splits, N, T] float32
    queries,
    keys,
    heads,
    key_blocks,
    splits,  # programs that share the heads of a block of keys
    images,  # N
    scale,
    q_n,
    q_h,
    q_t,
    k_n,
    k_h,
    k_t,
    v_n,
    v_h,
    v_t,
    g_n,
    g_h,
    g_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    split = tl.program_id(0) // key_blocks % splits
    n = tl.program_id(0) // key_blocks // splits
    j = tl.program_id(0) % key_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for h in range(heads * split // splits, heads * (split + 1) // splits):
        k_tile = rows_of(k, n, h, j, keys, k_n, k_h, k_t, D, BLOCK_D, UNIT)
        v_tile = rows_of(v, n, h, j, keys, v_n, v_h, v_t, D, BLOCK_D, UNIT)
        row = (n.to(tl.int64) * heads + h) * queries
        for start in range(0, queries, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            q_tile = rows_of(q, n, h, i, queries, q_n, q_h, q_t, D, BLOCK_D, UNIT)
            g_tile = rows_of(grad_out, n, h, i, queries, g_n, g_h, g_t, D, BLOCK_D, UNIT)
            top = tl.load(maximum + row + i, mask=i < queries, other=0.0)
            share = tl.load(weight + row + i, mask=i < queries, other=0.0)  # 0 for queries that are padding
            scores = product(k_tile, q_tile, WIDEN)
            grads = product(v_tile, g_tile, WIDEN)
            weighted = tl.exp2((scores - top[None, :]) * scale) * grads
            total += share[None, :] * tl.maximum(weighted, 0.0, propagate_nan=tl.PropagateNan.ALL)
    row_sum = tl.sum(total, axis=1)
    at = n.to(tl.int64) * keys + j
    r = tl.load(relevance + at, mask=(j < keys) & (split == 0), other=0.0)
    tl.store(out + split.to(tl.int64) * images * keys + at, r + row_sum, mask=j < keys)


@triton.jit
def maskcf_one_query_scores(
    q,  # [N, H, 1, d]
    k,  # [N, H, T, d]
    relevance,  # [N, T] float32
    scores,  # [N, H, T] float32, written
    maximum,  # [N, H] float32, written
    weight,  # [N, H] float32, written: r / (l H)
    keys,
    heads,
    scale,
    q_n,
    q_h,
    k_n,
    k_h,
    k_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0)  # of [N * H]
    n, h = row // heads, row % heads
    query = rows_of(q, n, h, tl.arange(0, 1), 1, q_n, q_h, 0, D, BLOCK_D, UNIT).to(tl.float32)  # [1, BLOCK_D]
    top = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, keys, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        score = tl.sum(query * rows_of(k, n, h, j, keys, k_n, k_h, k_t, D, BLOCK_D, UNIT).to(tl.float32), axis=1)
        tl.store(scores + row.to(tl.int64) * keys + j, score, mask=j < keys)
        higher = tl.maximum(top, tl.max(tl.where(j < keys, score, LOWEST), axis=0))
        exponentials = tl.where(j < keys, tl.exp2((score - higher) * scale), 0.0)
        total = total * tl.exp2((top - higher) * scale) + tl.sum(exponentials, axis=0)
        top = higher
    tl.store(maximum + row, top)
    tl.store(weight + row, tl.load(relevance + n.to(tl.int64) * keys) / (total * heads))


@triton.jit
def maskcf_one_query(
    v,  # [N, H, T, d]
    grad_out,  # [N, H, 1, d]
    relevance,  # [N, T] float32
    scores,  # [N, H, T] float32
    maximum,  # [N, H] float32
    weight,  # [N, H] float32
    out,  # [splits, N, T] float32
    keys,
    heads,
    key_blocks,
    splits,
    images,
    scale,
    v_n,
    v_h,
    v_t,
    g_n,
    g_h,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0) // key_blocks % splits
    n = tl.program_id(0) // key_blocks // splits
    j = tl.program_id(0) % key_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    for h in range(heads * split // splits, heads * (split + 1) // splits):
        row = n.to(tl.int64) * heads + h
        grad = rows_of(grad_out, n, h, tl.arange(0, 1), 1, g_n, g_h, 0, D, BLOCK_D, UNIT).to(tl.float32)
        grads = tl.sum(grad * rows_of(v, n, h, j, keys, v_n, v_h, v_t, D, BLOCK_D, UNIT).to(tl.float32), axis=1)
        score = tl.load(scores + row * keys + j, mask=j < keys, other=0.0)
        weighted = tl.exp2((score - tl.load(maximum + row)) * scale) * grads
        total += tl.load(weight + row) * tl.maximum(weighted, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = n.to(tl.int64) * keys + j
    r = tl.load(relevance + at, mask=(j < keys) & (split == 0), other=0.0)
    tl.store(out + split.to(tl.int64) * images * keys + at, r + total, mask=j < keys)


def head_splits(
    programs: int,  # blocks of keys, over all images
    heads: int,
    device: torch.device,
) -> int:
    """How many programs share the heads of a block of keys: enough to give each processor two."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(heads, 2 * processors // programs))


def reachable(
    x: Tensor,  # [N, H, T, d]
) -> Tensor:
    """The tensor, or a copy whose last dimension is dense and whose heads span less than 2**31 elements."""
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def attention_relevance(
    q: Tensor,  # [N, H, Tq, d], Tq = T or 1
    k: Tensor,  # [N, H, T, d]
    v: Tensor,  # [N, H, T, d]
    grad_out: Tensor,  # [N, H, Tq, d]
    relevance: Tensor,  # [N, T] float32
    scale: float,
) -> Tensor:  # [N, T] float32
    """As the contract."""
    if scale < 0:
        q, scale = -q, -scale
    q, k, v, grad_out = (reachable(x) for x in (q, k, v, grad_out))
    relevance = relevance.contiguous()
    n, h, tq, d = q.shape
    t = k.shape[2]
    strides = [x.stride()[:3] for x in (q, k, v, grad_out)]
    unit = power_of_two_in(*(s for row in strides for s in row), limit=VECTOR_BYTES // q.element_size())
    shape = {"D": d, "BLOCK_D": max(16, triton.next_power_of_2(d)), "UNIT": unit}
    if tq == 1:
        tiles = tuning.tiles("relevance of one query", q.device)
    else:
        tiles = tuning.tiles("relevance", q.device, half=q.dtype != torch.float32, width=shape["BLOCK_D"])
    key_blocks = triton.cdiv(t, tiles["BLOCK_K"])
    splits = head_splits(n * key_blocks, h, q.device)
    maximum, weight = torch.empty(2, n, h, tq, dtype=torch.float32, device=q.device)
    out = torch.empty(splits, n, t, dtype=torch.float32, device=q.device)
    (q_n, q_h, q_t), (k_n, k_h, k_t), (v_n, v_h, v_t), (g_n, g_h, g_t) = ([s // unit for s in row] for row in strides)
    scale *= LOG2_E
    with on_device_of(q):
        if tq == 1:
            scores = torch.empty(n, h, t, dtype=torch.float32, device=q.device)
            maskcf_one_query_scores[(n * h,)](
                q, k, relevance, scores, maximum, weight, t, h, scale,
                q_n, q_h, k_n, k_h, k_t, **shape, **tiles,
            )  # fmt: skip
            maskcf_one_query[(n * key_blocks * splits,)](
                v, grad_out, relevance, scores, maximum, weight, out, t, h, key_blocks, splits, n, scale,
                v_n, v_h, v_t, g_n, g_h, **shape, **tiles,
            )  # fmt: skip
        else:
            query_blocks = triton.cdiv(tq, tiles["BLOCK_Q"])
            tiles |= shape | {"WIDEN": triton.knobs.runtime.interpret}
            maskcf_softmax[(n * h * query_blocks,)](
                q, k, relevance, maximum, weight, tq, t, h, query_blocks, scale,
                q_n, q_h, q_t, k_n, k_h, k_t, **tiles,
            )  # fmt: skip
            maskcf_relevance[(n * key_blocks * splits,)](
                q, k, v, grad_out, relevance, maximum, weight, out, tq, t, h, key_blocks, splits, n, scale,
                q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, g_n, g_h, g_t,
                **tiles,
            )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)
