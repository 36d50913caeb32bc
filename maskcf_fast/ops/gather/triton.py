"""Token-space refill in Triton; its backward sums in a fixed order, without atomics.

The backward turns the donors round: for every image, the images that took something from it, in ascending order
(a stable sort and the bounds of its runs, on the device). Each gradient token is then one program's own sum.
"""

# mypy: allow-untyped-defs
# (Triton gives a kernel's arguments their types; the comments beside them say which.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from .._triton import VECTOR_BYTES, alignment, as_words, on_device_of, power_of_two_in


@triton.jit(do_not_specialize=["tiles"])
def maskcf_gather(
    tokens,  # [N, T, ROW] integers
    out,  # [N, T, ROW]
    mask,  # [N, L] uint8
    donors,  # [N] or, with MULTI, [N, L] int64
    tiles,  # programs per image
    L: tl.constexpr,
    PREFIX: tl.constexpr,  # T - L
    ROW: tl.constexpr,  # words of a token
    VEC: tl.constexpr,  # words of a unit
    UNITS: tl.constexpr,
    MULTI: tl.constexpr,
):
    n = (tl.program_id(0) // tiles).to(tl.int64)
    IMAGE: tl.constexpr = (PREFIX + L) * ROW
    unit = tl.program_id(0) % tiles * UNITS + tl.arange(0, UNITS)
    inside = unit < IMAGE // VEC
    patch = unit // (ROW // VEC) - PREFIX  # below 0 stays
    is_patch = inside & (patch >= 0)
    replaced = tl.load(mask + n * L + patch, mask=is_patch, other=0) != 0
    donor = tl.load(donors + n * L + patch, mask=replaced, other=0) if MULTI else tl.load(donors + n)
    source = tl.where(replaced, donor, n)
    word = (unit * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    words = tl.load(tokens + source[:, None] * IMAGE + word, mask=inside[:, None])
    tl.store(out + n * IMAGE + word, words, mask=inside[:, None])


@triton.jit(do_not_specialize=["num_images", "num_patches", "prefix"])
def maskcf_gather_backward(
    grad_out,  # [N, T, D]
    grad,  # [N, T, D]
    mask,  # [N, L] uint8
    receivers,  # [N] or, with MULTI, [N, L]: images in the order of their donors
    starts,  # [N + 1] or, with MULTI, [L, N + 1]: where each donor's receivers begin
    num_images,
    num_patches,
    prefix,
    width,  # D
    stride_n,  # T * D
    BLOCK: tl.constexpr,
    MULTI: tl.constexpr,
):
    donor = (tl.program_id(0) // (prefix + num_patches)).to(tl.int64)
    patch = tl.program_id(0) % (prefix + num_patches) - prefix
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = (patch + prefix).to(tl.int64) * width + column
    stays = True
    if patch >= 0:
        stays = tl.load(mask + donor * num_patches + patch) == 0
    own = tl.load(grad_out + donor * stride_n + at, mask=inside & stays, other=0.0)
    total = own.to(tl.float64) if grad.dtype.element_ty == tl.float64 else own.to(tl.float32)
    if patch >= 0:
        run = starts + (patch.to(tl.int64) * (num_images + 1) if MULTI else 0) + donor
        for i in range(tl.load(run), tl.load(run + 1)):
            receiver = tl.load(receivers + (i * num_patches + patch if MULTI else i))
            taken = tl.load(mask + receiver * num_patches + patch) != 0
            part = tl.load(grad_out + receiver * stride_n + at, mask=inside & taken, other=0.0)
            total += part.to(total.dtype)
    tl.store(grad + donor * stride_n + at, total.to(grad.dtype.element_ty), mask=inside)


def receivers_of(
    donors: Tensor,  # [N] or [N, L] int64
) -> tuple[Tensor, Tensor]:  # like donors, and [N + 1] or [L, N + 1]
    """Images sorted by their donor (stable, so ascending within a run), and where each donor's run starts."""
    ordered, receivers = torch.sort(donors, dim=0, stable=True)
    bounds = torch.arange(len(donors) + 1, device=donors.device)
    rows = ordered.movedim(0, -1).contiguous()
    return receivers, torch.searchsorted(rows, bounds.expand(*rows.shape[:-1], -1).contiguous())


def gather_tokens(
    tokens: Tensor,  # [N, T, D]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    prefix: int,  # T - L
) -> Tensor:  # [N, T, D]
    """As the contract."""
    n, t, d = tokens.shape
    tokens = tokens.contiguous()
    out = torch.empty_like(tokens)
    row = d * tokens.element_size()
    unit = power_of_two_in(row, alignment(tokens), alignment(out), limit=VECTOR_BYTES)
    word = min(unit, 8)
    options: dict[str, Any] = tuning.tiles("gather", tokens.device)
    tiles = triton.cdiv(t * row // unit, options["UNITS"])
    if t * row // word >= 2**31:
        raise RuntimeError(f"impl='triton' takes images of less than 2**31 words of tokens, got {t * row // word}")
    with on_device_of(tokens):
        maskcf_gather[(n * tiles,)](
            as_words(tokens, word),
            as_words(out, word),
            mask.contiguous().view(torch.uint8),
            donors.contiguous(),
            tiles,
            L=t - prefix,
            PREFIX=prefix,
            ROW=row // word,
            VEC=unit // word,
            MULTI=donors.ndim == 2,
            **options,
        )
    return out


def gather_tokens_backward(
    grad_out: Tensor,  # [N, T, D]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    prefix: int,  # T - L
) -> Tensor:  # [N, T, D]
    """As the contract, in a fixed order."""
    n, t, d = grad_out.shape
    grad_out = grad_out.contiguous()
    grad = torch.empty_like(grad_out)
    receivers, starts = receivers_of(donors)
    most = tuning.tiles("gather backward", grad.device)
    block = min(triton.next_power_of_2(d), most["BLOCK"])
    with on_device_of(grad_out):
        maskcf_gather_backward[(n * t, triton.cdiv(d, block))](
            grad_out,
            grad,
            mask.contiguous().view(torch.uint8),
            receivers.contiguous(),
            starts,
            n,
            t - prefix,
            prefix,
            d,
            t * d,
            BLOCK=block,
            MULTI=donors.ndim == 2,
            # A warp moves 512 bytes at once.
            num_warps=min(max(block * grad.element_size() // 512, 1), most["num_warps"]),
        )
    return grad
