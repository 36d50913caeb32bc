"""Argument checks shared by the public functions.

Shape, dtype and device checks always run: they read no tensor values. Checks that read values would stall
a GPU, so they run where the data lives on the CPU anyway, or everywhere when ``MASKCF_DEBUG=1``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def value_checks(tensor: Tensor) -> bool:
    """Whether this call may read the values of ``tensor`` (never while it is traced or fake)."""
    if torch.compiler.is_compiling() or (type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter)):
        return False
    return tensor.device.type == "cpu" or debug_enabled()


def debug_enabled() -> bool:
    """Whether ``MASKCF_DEBUG`` asks for the checks that cost a pass over the data."""
    return os.environ.get("MASKCF_DEBUG", "0") not in ("", "0")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise unless ``tensor`` has the given shape (names stand for any size), dtype and device.

    A shape that begins with ``"..."`` has any number of further dimensions there.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    last = len(shape) - 1 if shape[:1] == ["..."] else None  # dimensions that are compared
    fits = tensor.ndim == len(shape) if last is None else tensor.ndim >= last
    pairs = zip(reversed(shape[-last:] if last else shape), reversed(tensor.shape), strict=False)
    if not (fits and all(isinstance(want, str) or want == have for want, have in pairs)):
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other arguments, got {tensor.device}")


def check_batch(name: str, tensor: Tensor) -> None:
    """Raise if any dimension of ``tensor`` is empty."""
    if 0 in tensor.shape:
        raise ValueError(f"{name} must not be empty, got shape {list(tensor.shape)}")


def check_int(name: str, value: int, low: int, high: int | None = None, symbol: str = "") -> None:
    """Raise unless ``value`` is an int from ``low`` to ``high``, which the message may give a ``symbol``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if high is None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if high is not None and not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {symbol and symbol + '='}{high}, got {value}")


def check_number(name: str, value: float) -> float:
    """The value as a float; raise unless it is a number."""
    if isinstance(value, bool | str | Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if value != value:
        raise ValueError(f"{name} must be a number, got NaN")
    return float(value)


def check_numbers(name: str, values: Sequence[float]) -> list[float]:
    """The values as floats; raise unless they are numbers."""
    check_sequence(name, values)
    if all(type(value) is float and value == value for value in values):  # as a rule, and not worth a microsecond each
        return list(values)
    return [check_number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def check_sequence(name: str, values: object) -> None:
    """Raise unless ``values`` is a list, a tuple or the like."""
    if not isinstance(values, list | tuple) and (isinstance(values, str) or not isinstance(values, Sequence)):
        raise TypeError(f"{name} must be a sequence, got {shown(values)}")


def shown(value: object) -> str:
    """A value as a message shows it."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_tokens(tokens: Tensor, mask: Tensor, prefix: int) -> tuple[int, int]:
    """Raise unless ``tokens`` are ``[N, prefix + L, D]`` and ``mask`` bool ``[N, L]``; N and L."""
    check_tensor("tokens", tokens, ["N", "T", "D"], dtypes=FLOATS)
    check_batch("tokens", tokens)
    check_int("prefix", prefix, 0, tokens.shape[1] - 1, "T - 1")
    n, num_patches = tokens.shape[0], tokens.shape[1] - prefix
    check_tensor("mask", mask, [n, num_patches], dtypes=[torch.bool], device=tokens.device)
    return n, num_patches


def check_donors(donors: Tensor, n: int, num_patches: int, device: torch.device) -> None:
    """Raise unless ``donors`` is int64 ``[N]`` or ``[N, L]`` with every index in ``[0, N)``."""
    if isinstance(donors, Tensor) and donors.ndim == 2:
        check_tensor("donors", donors, [n, num_patches], dtypes=[torch.int64], device=device)
    else:
        check_tensor("donors", donors, [n], dtypes=[torch.int64], device=device)
    if value_checks(donors):
        low, high = torch.aminmax(donors)
        if low < 0 or high >= n:
            bad = int(low) if low < 0 else int(high)
            raise ValueError(f"donors must index the batch, 0 to {n - 1}, got {bad}")


def resolve_grid(num_patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The patch grid ``(rows, columns)``; square unless given."""
    if grid is None:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(f"L={num_patches} patches are no square grid: pass grid=(rows, columns)")
        return side, side
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise ValueError(f"grid must be (rows, columns), got {shown(grid)}")
    for i, size in enumerate(grid):
        check_int(f"grid[{i}]", size, 1)
    if grid[0] * grid[1] != num_patches:
        raise ValueError(f"grid={tuple(grid)} does not hold L={num_patches} patches (rows × columns = L)")
    return grid[0], grid[1]


def check_divisible(height: int, width: int, grid: tuple[int, int]) -> None:
    """Raise unless an image of this size splits into the grid's patches."""
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"images of {height}×{width} pixels do not divide into a grid of {grid[0]}×{grid[1]} patches")
