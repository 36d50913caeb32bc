"""Token-space refill in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(
    tokens: Tensor,  # [N, 1 + L, D]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
) -> Tensor:  # [N, 1 + L, D]
    """``out[n, 0] = tokens[n, 0]``; ``out[n, 1 + p] = tokens[donor if mask[n, p] else n, 1 + p]``."""
    n, t, d = tokens.shape
    own = torch.arange(n, device=tokens.device)[:, None]
    donor = donors if donors.ndim == 2 else donors[:, None]
    source = torch.cat([own, torch.where(mask, donor, own)], dim=1)  # [N, T], the CLS token stays
    rows = source * t + torch.arange(t, device=tokens.device)
    # index_select rather than fancy indexing: its backward (index_add) is many times faster on a CPU.
    return tokens.reshape(n * t, d).index_select(0, rows.flatten()).view(n, t, d)
