"""What the Triton implementations share: the GPU to launch on, and copying tensors as wide integers."""

from __future__ import annotations

import math
import struct
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
VECTOR_BYTES = 16  # the widest access of one GPU thread


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one: Triton launches there, whatever the tensors say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two_in(*sizes: int, limit: int) -> int:
    """The largest power of two, at most ``limit``, that divides every size."""
    divisor = math.gcd(*sizes, limit)
    return divisor & -divisor


def alignment(tensor: Tensor) -> int:
    """Largest power of two, up to 16, that divides the bytes to the tensor's first element."""
    return power_of_two_in(tensor.data_ptr(), int(tensor.storage_offset()) * tensor.element_size(), limit=VECTOR_BYTES)


def as_words(
    tensor: Tensor,  # dense, in row-major order
    size: int,  # bytes of a word
) -> Tensor:  # [all words], sharing the storage
    """The tensor's bytes as one row of integers."""
    return tensor.reshape(-1).view(WORDS[size])


def bits_of(value: float) -> int:
    """A Python float as the integer with the same 64 bits; Triton would round a float argument to float32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return bits
