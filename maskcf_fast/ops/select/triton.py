"""Patch selection in Triton: one program per row, exact, without sorting.

The k-th value is found by bisection over integers that order like the floats, so a tie is a tie of bits. The
two device functions `row_rule` and `is_selected` are shared with the refill kernel, which selects on its own.
"""

# mypy: allow-untyped-defs
# (Triton gives a kernel's arguments their types; the comments beside them say which.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from .._triton import bits_of, on_device_of


@triton.jit
def sortable(
    cam,  # [BLOCK] float32 or float64, finite
    OBJECT: tl.constexpr,
):  # [BLOCK] int32 or int64
    """Integers in the order of selection: a greater key is taken first."""
    cam = tl.where(cam == 0, 0.0, cam)  # -0 ties with 0
    if cam.dtype == tl.float64:
        bits = cam.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = cam.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if not OBJECT:
        key = ~key
    return key


@triton.jit
def row_rule(
    cam,  # pointer to the row, [L]
    num_patches,  # L
    top_k,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    OBJECT: tl.constexpr,
):
    """What decides over one row: ``(usable, top, cut, last)``, scalars that `is_selected` takes.

    By threshold, ``top`` is the row's maximum. By top-k, a patch is selected if its key exceeds ``cut``, or
    equals it and its index is at most ``last``.
    """
    index = tl.arange(0, BLOCK)
    inside = index < num_patches
    row = tl.load(cam + index, mask=inside, other=0.0)
    usable = tl.min((tl.abs(row) < float("inf")).to(tl.int32), axis=0) == 1  # NaN compares false
    row = tl.where(usable, row, 0.0)
    top = tl.max(tl.where(inside, row, -float("inf")), axis=0)
    # Every finite key lies strictly between the keys of the two infinities, and those are each other's complement.
    if cam.dtype.element_ty == tl.float64:
        above = tl.full([], 0x7FF0000000000000, tl.int64)
    else:
        above = tl.full([], 0x7F800000, tl.int32)
    cut = ~above
    last = num_patches
    if TOP_K:
        key = tl.where(inside, sortable(row, OBJECT), cut)
        reached = num_patches  # how many keys are >= cut, never below top_k
        beyond = 0  # how many are >= above, always below top_k unless both are 0
        while (reached != top_k) & (cut < above - 1):
            # Halves first: the sum of two keys may not fit.
            middle = (cut >> 1) + (above >> 1) + (cut & above & 1)
            count = tl.sum((key >= middle).to(tl.int32), axis=0)
            enough = count >= top_k
            cut = tl.where(enough, middle, cut)
            reached = tl.where(enough, count, reached)
            above = tl.where(enough, above, middle)
            beyond = tl.where(enough, beyond, count)
        if reached != top_k:  # more keys equal the cut than there is room for: the lower indices win
            tie = key == cut
            rank = tl.cumsum(tie.to(tl.int32), axis=0)
            last = tl.max(tl.where(tie & (rank <= top_k - beyond), index, -1), axis=0)
    return usable, top, cut, last


@triton.jit
def is_selected(
    cam,  # [any] float, values of the row
    index,  # [any] patch index of each
    usable,
    top,
    cut,
    last,
    threshold_bits,
    TOP_K: tl.constexpr,
    OBJECT: tl.constexpr,
):  # [any] bool
    """Apply a row's rule. The arithmetic is the reference's, operation by operation: masks are identical."""
    cam = tl.where(usable, cam, 0.0)
    if TOP_K:
        key = sortable(cam, OBJECT)
        selected = (key > cut) | ((key == cut) & (index <= last))
    else:
        threshold = threshold_bits.to(tl.int64).to(tl.float64, bitcast=True).to(cam.dtype)
        top = top + tl.full([], 1e-8, cam.dtype)
        score = cam / top if cam.dtype == tl.float64 else tl.div_rn(cam, tl.zeros_like(cam) + top)
        selected = score > threshold
        if not OBJECT:
            selected = ~selected
    return selected


@triton.jit(do_not_specialize=["top_k", "threshold_bits"])
def maskcf_select(
    cam,  # [N, L] float
    mask,  # [N, L] uint8
    num_patches,
    top_k,
    threshold_bits,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    OBJECT: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    cam += n * num_patches
    usable, top, cut, last = row_rule(cam, num_patches, top_k, BLOCK, TOP_K, OBJECT)
    index = tl.arange(0, BLOCK)
    inside = index < num_patches
    values = tl.load(cam + index, mask=inside, other=0.0)
    selected = is_selected(values, index, usable, top, cut, last, threshold_bits, TOP_K, OBJECT)
    tl.store(mask + n * num_patches + index, selected.to(tl.uint8), mask=inside)


def select_patches(
    cam: Tensor,  # [N, L] float32 or float64
    threshold: float | None,
    top_k: int | None,
    context: bool,
) -> Tensor:  # [N, L] bool
    """As the contract."""
    n, num_patches = cam.shape
    mask = torch.empty(n, num_patches, dtype=torch.bool, device=cam.device)
    block = triton.next_power_of_2(num_patches)
    most = tuning.tiles("select", cam.device)
    with on_device_of(cam):
        maskcf_select[(n,)](
            cam.contiguous(),
            mask.view(torch.uint8),
            num_patches,
            top_k or 0,
            bits_of(threshold or 0.0),
            BLOCK=block,
            TOP_K=top_k is not None,
            OBJECT=not context,
            num_warps=min(max(block // most["WARP_PATCHES"], 1), most["num_warps"]),
        )
    return mask
