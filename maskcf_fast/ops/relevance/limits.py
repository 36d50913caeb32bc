"""What heads the kernels on a GPU can take."""

from __future__ import annotations

import functools
import sys

import torch

MAX_WIDTH = 128


def lacks(impl: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why an implementation has no kernel for heads of this dtype and width; None if it has."""
    if impl == "cpu":
        return None
    if dtype == torch.float64:
        return "no kernel for float64"
    if width > MAX_WIDTH:
        return f"heads are at most {MAX_WIDTH} wide, got d={width}"
    return lacks_shared(shared_limit(device), dtype, width) if impl == "cuda" else None


def lacks_shared(limit: int, dtype: torch.dtype, width: int) -> str | None:
    """The same of the CUDA kernel, where a block may have ``limit`` bytes of shared memory."""
    row = -(-width // 16) * 16 * dtype.itemsize + 16  # whole steps of the tensor cores, and a gap
    needed = 4 * 64 * row  # four tiles of 64 rows (csrc/relevance.cuh)
    if needed > limit:
        return f"heads of {width} {dtype} take {needed} bytes of shared memory per block, and the GPU has {limit}"
    return None


@functools.cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a kernel may ask for."""
    if device.type != "cuda":  # an emulated GPU refuses for itself
        return sys.maxsize
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
