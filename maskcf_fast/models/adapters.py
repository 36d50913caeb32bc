"""Low-rank adapters (LoRA): a layer's weight as what it was, which rests, plus a product of two narrow matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.errors import UserError
from .blocks import Block

LAYERS = ("attn.qkv", "attn.out", "fc", "proj")  # of a block


class LowRank(nn.Module):
    """``W + alpha / rank · B A``, with ``A`` drawn and ``B`` zero at the start, so that the model is the same.

    The sum is what the layer uses and its gradient is formed before it is passed on to A and B: every path through the
    model works as it is, gradients and moments of the optimiser are kept of A and B alone, and merging is reading.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, into = weight.shape
        self.a = nn.Parameter(torch.randn(rank, into, dtype=weight.dtype, device=weight.device) * into**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank, dtype=weight.dtype, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """``[out, in]`` → ``[out, in]``."""
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def add_adapters(blocks: Sequence[nn.Module], layers: Sequence[str], rank: int, alpha: float) -> None:
    """Give layers of these blocks adapters, in place, the only parameters of the blocks that are trained."""
    for block in cast(Sequence[Block], blocks):
        block.requires_grad_(False)
        for name in layers:
            layer = block.get_submodule(name)
            weight = cast(Tensor, layer.weight)
            if rank > (most := min(weight.shape)):
                raise UserError(f"optim.lora_rank={rank} is no low rank of {name}, which has {most}: take less")
            parametrize.register_parametrization(layer, "weight", LowRank(weight, rank, alpha))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` by the names of a model without adapters, each adapter added to its weight."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            own = f"{name}.parametrizations.weight."
            state = {key: tensor for key, tensor in state.items() if not key.startswith(own)}
            state[f"{name}.weight"] = cast(Tensor, module.weight).detach()
    return state
