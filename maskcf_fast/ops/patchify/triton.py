"""Pixels to rows of normalised patches in Triton: every output value is written once, the float image never exists.

A program writes a run of one image's rows, contiguous and as wide as they come, and reads the pixels wherever they
lie: any strides will do, so a permuted or sliced batch costs no copy.
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
from .._triton import on_device_of


@triton.jit(do_not_specialize=["tiles"])
def maskcf_patchify(
    images,  # [N, C, H, W] by its strides
    rows,  # [N, L, C * P * P]
    mask,  # [N, L] uint8, with REFILL
    donors,  # [N] or, with MULTI, [N, L] int64, with REFILL
    tiles,  # programs per image
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    COLS: tl.constexpr,  # patches side by side
    L: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    MEAN: tl.constexpr,  # C values each
    STD: tl.constexpr,
    BLOCK: tl.constexpr,
    REFILL: tl.constexpr,
    MULTI: tl.constexpr,
):
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)  # in the image's rows
    inside = at < L * C * P * P
    patch = at // (C * P * P)
    channel = at // (P * P) % C
    y = patch // COLS * P + at // P % P
    x = patch % COLS * P + at % P
    source = n
    if REFILL:
        replaced = tl.load(mask + n * L + patch, mask=inside, other=0) != 0
        donor = tl.load(donors + n * L + patch, mask=replaced, other=0) if MULTI else tl.load(donors + n)
        source = tl.where(replaced, donor, n)
    pixel = source * stride_n + channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    value = tl.load(images + pixel, mask=inside, other=0)
    kind: tl.constexpr = tl.float64 if images.dtype.element_ty == tl.float64 else tl.float32
    mean = tl.full([BLOCK], MEAN[0], kind)
    std = tl.full([BLOCK], STD[0], kind)
    for c in tl.static_range(1, C):
        mean = tl.where(channel == c, tl.full([BLOCK], MEAN[c], kind), mean)
        std = tl.where(channel == c, tl.full([BLOCK], STD[c], kind), std)
    # Operation by operation as in the reference, divisions rounded as IEEE wants: the results are identical.
    if kind == tl.float64:
        value = (value - mean) / std
        if rows.dtype.element_ty != tl.float64:
            value = value.to(tl.float32)  # as torch narrows float64 to half precision
    else:
        if images.dtype.element_ty == tl.uint8:
            value = tl.div_rn(value.to(tl.float32), tl.full([BLOCK], 255.0, tl.float32))
        value = tl.div_rn(value.to(tl.float32) - mean, std)
    tl.store(rows + n * (L * C * P * P) + at, value.to(rows.dtype.element_ty), mask=inside)


def patchify(
    images: Tensor,  # [N, H, W, C] uint8, or [N, C, H, W] float in [0, 1]
    patch_size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    mask: Tensor | None,  # [N, L] bool
    donors: Tensor | None,  # [N] or [N, L] int64
) -> Tensor:  # [N, L, C * P * P]
    """As the contract."""
    pixels = images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images
    n, c, h, w = pixels.shape
    cols = w // patch_size
    num_patches = h // patch_size * cols
    rows = torch.empty(n, num_patches, c * patch_size**2, dtype=dtype, device=images.device)
    options: dict[str, Any] = tuning.tiles("patchify", images.device)
    if rows[0].numel() >= 2**31 - options["BLOCK"]:
        raise RuntimeError(f"impl='triton' takes images of less than 2**31 values, got {rows[0].numel()}")
    tiles = triton.cdiv(rows[0].numel(), options["BLOCK"])
    refill = mask is not None and donors is not None
    with on_device_of(images):
        maskcf_patchify[(n * tiles,)](
            pixels,
            rows,
            mask.contiguous().view(torch.uint8) if mask is not None else rows,
            donors.contiguous() if donors is not None else rows,
            tiles,
            *pixels.stride(),
            COLS=cols,
            L=num_patches,
            C=c,
            P=patch_size,
            MEAN=tuple(mean),
            STD=tuple(std),
            REFILL=refill,
            MULTI=donors is not None and donors.ndim == 2,
            **options,
        )
    return rows
