"""Token-space refill in plain PyTorch: the contract of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(
    tokens: Tensor,  # [N, T, D]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    prefix: int,  # T - L
) -> Tensor:  # [N, T, D]
    """``out[n, t] = tokens[donor if mask[n, t - prefix] else n, t]``; the first ``prefix`` tokens stay."""
    # index_select rather than fancy indexing: its backward (index_add) is many times faster on a CPU.
    return tokens.flatten(0, 1).index_select(0, source_rows(mask, donors, prefix)).view(tokens.shape)


def gather_tokens_backward(
    grad_out: Tensor,  # [N, T, D]
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    prefix: int,  # T - L
) -> Tensor:  # [N, T, D]
    """The transpose: every token's gradient goes to where the token came from."""
    grads = grad_out.flatten(0, 1)
    return torch.zeros_like(grads).index_add(0, source_rows(mask, donors, prefix), grads).view(grad_out.shape)


def source_rows(
    mask: Tensor,  # [N, L] bool
    donors: Tensor,  # [N] or [N, L] int64
    prefix: int,  # T - L
) -> Tensor:  # [N * T] int64
    """Where each token comes from, counted through the batch."""
    n, t = len(mask), prefix + mask.shape[1]
    own = torch.arange(n, device=mask.device)[:, None]
    donor = donors if donors.ndim == 2 else donors[:, None]
    source = torch.cat([own.expand(-1, prefix), torch.where(mask, donor, own)], dim=1)  # [N, T]
    return (source * t + torch.arange(t, device=mask.device)).flatten()
