"""Bias and GELU in Triton. The bias's gradient is summed by blocks of rows, then over the blocks: without atomics."""

# mypy: allow-untyped-defs
# (Triton gives a kernel's arguments their types; the comments beside them say which.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from .._triton import on_device_of
from .reference import KINDS as KINDS


@triton.jit
def gelu_of(z, KIND: tl.constexpr):  # of reference.KINDS
    """GELU and its derivative."""
    if KIND == 0:
        half_root = tl.full((1,), 0.70710678118654752, z.dtype)
        cdf = 0.5 * (1 + tl.erf(z * half_root))
        slope = cdf + z * tl.exp(-0.5 * z * z) * tl.full((1,), 0.39894228040143268, z.dtype)
    else:  # z σ(y)
        cube = tl.full((1,), 0.044715, z.dtype)
        rate = tl.full((1,), 1.702 if KIND == 2 else 1.5957691216057308, z.dtype)  # 2 sqrt(2 / π)
        y = rate * z if KIND == 2 else rate * z * (1 + cube * z * z)
        dy = rate if KIND == 2 else rate * (1 + 3 * cube * z * z)
        small = tl.exp(-tl.abs(y))
        most = 1 / (1 + small)
        cdf = tl.where(y < 0, small * most, most)
        slope = cdf + z * most * small * most * dy
    return z * cdf, slope


@triton.jit(do_not_specialize=["rows"])
def maskcf_bias_gelu(
    x,  # [rows, width]
    bias,  # [width] float32 or float64
    grad,  # [rows, width], with BACKWARD
    out,  # [rows, width]: the result, or x's gradient
    partial,  # [blocks of rows, width] like bias, with BACKWARD
    rows,
    width,
    KIND: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < width)
    at = row.to(tl.int64) * width + col
    shift = tl.load(bias + col, mask=col < width, other=0.0)
    value, slope = gelu_of(tl.load(x + at, mask=inside, other=0.0).to(shift.dtype) + shift, KIND)
    if BACKWARD:
        value = tl.load(grad + at, mask=inside, other=0.0).to(shift.dtype) * slope
        total = tl.sum(tl.where(inside, value, 0.0), axis=0)[None, :]
        tl.store(partial + tl.program_id(0).to(tl.int64) * width + col, total, mask=col < width)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def bias_gelu(
    x: Tensor,  # [..., D]
    bias: Tensor,  # [D]
    kind: int,
) -> Tensor:  # like x
    """As the contract."""
    return _launch(x, bias, None, kind)[0]


def bias_gelu_backward(
    grad: Tensor,  # [..., D]
    x: Tensor,  # [..., D]
    bias: Tensor,  # [D]
    kind: int,
) -> tuple[Tensor, Tensor]:  # like x, like bias
    """As the contract, in a fixed order."""
    out, partial = _launch(x, bias, grad, kind)
    return out, partial.sum(dim=0)


def _launch(x: Tensor, bias: Tensor, grad: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    x, bias, backward = x.contiguous(), bias.contiguous(), grad is not None
    grad = x if grad is None else grad.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    options = tuning.tiles("bias_gelu", x.device)
    blocks = triton.cdiv(rows, options["ROWS"])
    out, partial = torch.empty_like(x), bias.new_empty(blocks if backward else 0, width)
    if rows:
        with on_device_of(x):
            maskcf_bias_gelu[(blocks, triton.cdiv(width, options["COLS"]))](
                x, bias, grad, out, partial, rows, width, KIND=kind, BACKWARD=backward, **options
            )
    return out, partial
