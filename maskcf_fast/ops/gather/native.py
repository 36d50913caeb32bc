"""Token-space refill by the compiled extension, and its gradient."""

from __future__ import annotations

from torch import Tensor

from .. import extension
from . import gradient

OPS = extension.ops()


gradient.register("maskcf")


def gather_tokens(
    tokens: Tensor,  # [N, 1 + L, D]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
) -> Tensor:  # [N, 1 + L, D]
    """``out[n, 0] = tokens[n, 0]``; ``out[n, 1 + p] = tokens[donor if mask[n, p] else n, 1 + p]``."""
    return OPS.gather_tokens(tokens.contiguous(), mask.contiguous(), donors.contiguous())
