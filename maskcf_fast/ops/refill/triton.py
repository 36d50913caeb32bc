"""Pixel refill in Triton: selection and copy in one launch, every access as wide as the layout allows.

Both memory formats are the same kernel. A *line* is what lies contiguous in one row of pixels: ``W`` values
(contiguous), or ``W * C`` (channels-last); patch columns cut it into *segments*. A thread moves a *unit* of up to
16 bytes. Where a patch is not a multiple of a unit wide (14 pixels of float32: 56 bytes), a unit may straddle two
segments: it is then read from both sources and blended, so that accesses stay wide.
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
from .._triton import VECTOR_BYTES, alignment, as_words, bits_of, on_device_of, power_of_two_in
from ..select.triton import is_selected, row_rule


@triton.jit
def source_image(
    n,  # int64
    patch,  # [UNITS]
    inside,  # [UNITS] bool
    cam,  # [N, L] float, with SELECT
    mask,  # [N, L] uint8, without
    donors,  # [N] or, with MULTI, [N, L] int64
    usable,
    top,
    cut,
    last,
    threshold_bits,
    L: tl.constexpr,
    SELECT: tl.constexpr,
    TOP_K: tl.constexpr,
    OBJECT: tl.constexpr,
    MULTI: tl.constexpr,
):  # [UNITS] int64
    """The image that each patch is taken from."""
    at = n * L + patch
    if SELECT:
        value = tl.load(cam + at, mask=inside, other=0.0)
        replaced = is_selected(value, patch, usable, top, cut, last, threshold_bits, TOP_K, OBJECT)
    else:
        replaced = tl.load(mask + at, mask=inside, other=0) != 0
    donor = tl.load(donors + at, mask=inside & replaced, other=0) if MULTI else tl.load(donors + n)
    return tl.where(replaced, donor, n)


@triton.jit(do_not_specialize=["tiles", "top_k", "threshold_bits"])
def maskcf_refill(
    images,  # [N, IMAGE] integers
    out,  # [N, IMAGE]
    cam,  # [N, L] float, with SELECT
    mask,  # [N, L] uint8, written with SELECT, else read
    donors,  # [N] or [N, L] int64
    tiles,  # programs per image
    top_k,
    threshold_bits,
    IMAGE: tl.constexpr,  # words of an image; the geometry is constant so that no division remains
    LINE: tl.constexpr,  # words of a line
    HEIGHT: tl.constexpr,  # lines of a plane
    SEGMENT: tl.constexpr,  # words of a patch's line
    PATCH_LINES: tl.constexpr,
    COLS: tl.constexpr,  # patches side by side
    L: tl.constexpr,
    VEC: tl.constexpr,  # words of a unit
    UNITS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SELECT: tl.constexpr,
    TOP_K: tl.constexpr,
    OBJECT: tl.constexpr,
    MULTI: tl.constexpr,
):
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    usable, top, cut, last = True, 0.0, 0, 0
    if SELECT:
        usable, top, cut, last = row_rule(cam + n * L, L, top_k, BLOCK_L, TOP_K, OBJECT)
        if tile == 0:
            index = tl.arange(0, BLOCK_L)
            value = tl.load(cam + n * L + index, mask=index < L, other=0.0)
            chosen = is_selected(value, index, usable, top, cut, last, threshold_bits, TOP_K, OBJECT)
            tl.store(mask + n * L + index, chosen.to(tl.uint8), mask=index < L)

    LINE_UNITS: tl.constexpr = LINE // VEC
    lane = tl.arange(0, VEC)[None, :]
    for step in range(STEPS):
        unit = (tile * STEPS + step) * UNITS + tl.arange(0, UNITS)
        inside = unit < IMAGE // VEC
        first_patch = unit // LINE_UNITS % HEIGHT // PATCH_LINES * COLS
        column = unit % LINE_UNITS * VEC  # of the unit's first word
        left = source_image(
            n,
            first_patch + column // SEGMENT,
            inside,
            cam,
            mask,
            donors,
            usable,
            top,
            cut,
            last,
            threshold_bits,
            L,
            SELECT,
            TOP_K,
            OBJECT,
            MULTI,
        )
        word = (unit * VEC)[:, None] + lane  # [UNITS, VEC]
        words = tl.load(images + left[:, None] * IMAGE + word, mask=inside[:, None])
        if SEGMENT % VEC != 0:
            right = source_image(
                n,
                first_patch + (column + VEC - 1) // SEGMENT,
                inside,
                cam,
                mask,
                donors,
                usable,
                top,
                cut,
                last,
                threshold_bits,
                L,
                SELECT,
                TOP_K,
                OBJECT,
                MULTI,
            )
            differ = inside & (right != left)
            others = tl.load(images + right[:, None] * IMAGE + word, mask=differ[:, None])
            beyond = lane >= (SEGMENT - column % SEGMENT)[:, None]
            words = tl.where(beyond & differ[:, None], others, words)
        tl.store(out + n * IMAGE + word, words, mask=inside[:, None])


def geometry(
    images: Tensor,  # [N, C, H, W], contiguous or channels-last
    out: Tensor,
    rows: int,
    cols: int,
) -> tuple[int, dict[str, int]]:
    """Bytes of a word, and the kernel's constants that follow from the layout."""
    _, c, h, w = images.shape
    planes, values = (c, w) if images.is_contiguous() else (1, w * c)
    line = values * images.element_size()
    segment = line // cols
    unit = power_of_two_in(line, alignment(images), alignment(out), limit=VECTOR_BYTES)
    while unit > segment:  # a unit may straddle two segments, not three
        unit //= 2
    word = power_of_two_in(unit, segment, limit=8)
    constants = {
        "IMAGE": planes * h * line // word,
        "LINE": line // word,
        "HEIGHT": h,
        "SEGMENT": segment // word,
        "PATCH_LINES": h // rows,
        "COLS": cols,
        "L": rows * cols,
        "VEC": unit // word,
        "BLOCK_L": triton.next_power_of_2(rows * cols),
    }
    if constants["IMAGE"] >= 2**31:
        raise RuntimeError(f"impl='triton' takes images of less than 2**31 words, got {constants['IMAGE']}")
    return word, constants


def launch(
    images: Tensor,  # [N, C, H, W]
    mask: Tensor,  # [N, L] bool
    cam: Tensor | None,  # [N, L] float; with it the mask is written, without it read
    donors: Tensor,  # [N] or [N, L] int64
    threshold: float | None,
    top_k: int | None,
    context: bool,
    rows: int,
    cols: int,
) -> Tensor:  # like images
    """Refill into a new tensor, in one launch."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    images = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    out = torch.empty_like(images)
    word, constants = geometry(images, out, rows, cols)
    order = (0, 2, 3, 1) if last else (0, 1, 2, 3)  # dimensions as they lie in memory
    options: dict[str, Any] = tuning.tiles("refill", images.device)
    if cam is None:
        options["STEPS"] = 1  # there is no selection to find
    if constants["SEGMENT"] % constants["VEC"] != 0:
        options["UNITS"] //= 2  # units straddle: two sources at once would spill
    tiles = triton.cdiv(constants["IMAGE"] // constants["VEC"], options["UNITS"] * options["STEPS"])
    with on_device_of(images):
        maskcf_refill[(images.shape[0] * tiles,)](
            as_words(images.permute(order), word),
            as_words(out.permute(order), word),
            mask if cam is None else cam.contiguous(),
            mask.view(torch.uint8),
            donors.contiguous(),
            tiles,
            top_k or 0,
            bits_of(threshold or 0.0),
            SELECT=cam is not None,
            TOP_K=top_k is not None,
            OBJECT=not context,
            MULTI=donors.ndim == 2,
            **constants,
            **options,
        )
    return out


def refill_patches(
    images: Tensor,  # [N, C, H, W]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    rows: int,
    cols: int,
) -> Tensor:  # like images
    """As the contract."""
    return launch(images, mask.contiguous(), None, donors, None, None, False, rows, cols)


def counterfactual_refill(
    images: Tensor,  # [N, C, H, W]
    cam: Tensor,  # [N, L] float32 or float64
    donors: Tensor,  # [N] or [N, L] int64
    threshold: float | None,
    top_k: int | None,
    context: bool,
    rows: int,
    cols: int,
) -> tuple[Tensor, Tensor]:  # like images, and the mask [N, L] bool
    """As the contract."""
    mask = torch.empty(cam.shape, dtype=torch.bool, device=cam.device)
    return launch(images, mask, cam, donors, threshold, top_k, context, rows, cols), mask
