"""A residual sum and its LayerNorm in Triton: a row at a time in registers. The gradients of weight and bias are summed
by blocks of rows, then over the blocks: without atomics."""

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
def normalised(z, inside, width, eps):
    """A row less its mean, over its standard deviation; the inverse of that."""
    off = tl.where(inside, z - tl.sum(z) / width, 0.0)
    scale = 1 / tl.sqrt(tl.sum(off * off) / width + eps)
    return off * scale, scale


@triton.jit(do_not_specialize=["eps_bits"])
def maskcf_residual_norm(
    x,  # [rows, width]
    branch,  # [rows, width], with BRANCH
    weight,  # [width] float32 or float64
    bias,  # [width], likewise
    total,  # [rows, width], likewise
    normed,  # [rows, width]
    eps_bits,
    width,
    BRANCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.arange(0, BLOCK)
    inside = col < width
    at = tl.program_id(0).to(tl.int64) * width + col
    w = tl.load(weight + col, mask=inside, other=0.0)
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True).to(w.dtype)
    z = tl.load(x + at, mask=inside, other=0.0).to(w.dtype)
    if BRANCH:
        rounded = (z + tl.load(branch + at, mask=inside, other=0.0).to(w.dtype)).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        z = rounded.to(w.dtype)
    z, _ = normalised(z, inside, width, eps)
    value = z * w + tl.load(bias + col, mask=inside, other=0.0)
    tl.store(normed + at, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["eps_bits", "rows"])
def maskcf_residual_norm_backward(
    grad_total,  # [rows, width], with BRANCH
    grad_normed,  # [rows, width]
    total,  # [rows, width]
    weight,  # [width] float32 or float64
    grad,  # [rows, width]
    partial,  # [2, blocks of rows, width] like weight: of its gradient, and of the bias's
    eps_bits,
    rows,
    width,
    BRANCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.arange(0, BLOCK)
    inside = col < width
    w = tl.load(weight + col, mask=inside, other=0.0)
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True).to(w.dtype)
    of_weight, of_bias = tl.zeros_like(w), tl.zeros_like(w)
    block = tl.program_id(0)
    for i in range(ROWS):
        row = block * ROWS + i
        at, here = row.to(tl.int64) * width + col, inside & (row < rows)
        g = tl.load(grad_normed + at, mask=here, other=0.0).to(w.dtype)
        z, scale = normalised(tl.load(total + at, mask=here, other=0.0).to(w.dtype), inside, width, eps)
        weighted = g * w
        inner = weighted - tl.sum(weighted) / width - z * (tl.sum(weighted * z) / width)
        value = scale * inner
        if BRANCH:
            value += tl.load(grad_total + at, mask=here, other=0.0).to(w.dtype)
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=here)
        of_weight += g * z
        of_bias += g
    to = block.to(tl.int64) * width + col
    tl.store(partial + to, of_weight, mask=inside)
    tl.store(partial + tl.num_programs(0).to(tl.int64) * width + to, of_bias, mask=inside)


def residual_norm(
    x: Tensor,  # [..., D]
    branch: Tensor | None,  # like x
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor]:  # both like x; without a branch the first is empty, [0]
    """As the contract."""
    x, weight, bias = (t.contiguous() for t in (x, weight, bias))
    given = x if branch is None else branch.contiguous()
    total, normed, width = x.new_empty(0 if branch is None else x.shape), torch.empty_like(x), len(weight)
    if rows := x.numel() // width:
        with on_device_of(x):
            maskcf_residual_norm[(rows,)](
                x, given, weight, bias, total, normed, bits_of(eps), width, BRANCH=branch is not None,
                **_tiles("residual_norm", x, width)
            )  # fmt: skip
    return total, normed


def residual_norm_backward(
    grad_total: Tensor | None,  # [..., D]
    grad_normed: Tensor,  # [..., D]
    total: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # like total, like weight, like weight
    """As the contract, in a fixed order."""
    first = grad_normed if grad_total is None else grad_total
    given = tuple(t.contiguous() for t in (first, grad_normed, total, weight))
    total, width = given[2], len(weight)
    rows, options = total.numel() // width, _tiles("residual_norm backward", total, width)
    blocks = triton.cdiv(rows, options["ROWS"])
    grad, partial = torch.empty_like(total), weight.new_empty(2, blocks, width)
    if rows:
        with on_device_of(total):
            maskcf_residual_norm_backward[(blocks,)](
                *given, grad, partial, bits_of(eps), rows, width, BRANCH=grad_total is not None, **options
            )
    of_weight, of_bias = (part.sum(dim=0) for part in partial)  # an op's results share no memory
    return grad, of_weight, of_bias


def _tiles(kernel: str, x: Tensor, width: int) -> dict[str, int]:
    found, block = tuning.tiles(kernel, x.device), triton.next_power_of_2(width)
    warps = min(found["num_warps"], max(block * x.element_size() // 512, 1))  # a warp moves 512 bytes at once
    return found | {"BLOCK": block, "num_warps": warps}
