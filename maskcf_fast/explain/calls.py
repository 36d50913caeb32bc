"""What is noted of a model's attention calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


@dataclass(frozen=True, eq=False)
class Call:
    """One call of scaled-dot-product attention; inputs are references, detached."""

    q: Tensor  # [N, H, Tq, d]
    k: Tensor  # [N, H, T, d], or fewer heads
    v: Tensor  # [N, H, T, d], or fewer heads
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    o: Tensor  # [N, H, Tq, d], the output, in the graph
    edge: GradientEdge | None  # the output's place in the graph; None without gradients
    grid: tuple[int, int, int] | None  # [N, rows, columns] of the last convolution before

    @property
    def node(self) -> Node:
        """The graph's node that made the output."""
        assert self.edge is not None
        return self.edge.node

    @property
    def masked(self) -> bool:
        """Whether some key is hidden or biased (waits for the device if there is a mask)."""
        if self.causal and self.q.shape[-2] > 1:
            return True
        if self.mask is None:
            return False
        return not bool(self.mask.all() if self.mask.dtype == torch.bool else (self.mask == 0).all())


class Calls:
    """The calls of one or more forward passes, in their order, and what else was seen of attention."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.maps: list[torch.Size] = []  # shapes of attention maps written out by an explicit softmax
        self.weights: list[Node] = []  # where maps that a multi-head attention was asked for lie in the graph
        self.one_pass = False  # all calls are of one forward pass, so none may be missing
