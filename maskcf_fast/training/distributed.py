"""Gradients of several processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.processes import Processes
from ..methods.method import run


class _Deferred(nn.Module):
    """Calls what it is given: what `DistributedDataParallel` waits for is a module's forward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


def reduce_gradients(module: nn.Module, processes: Processes) -> Callable[[Callable[[], Tensor]], Tensor]:
    """What computes a loss such that its backward pass averages ``module``'s gradients over the processes.

    What ``grad`` already holds is averaged along with it, while the rest of the backward pass still runs.
    """
    if processes.world_size == 1:
        return run
    # Not static_graph=True: gradients were wrong by percents, for a pass with roots outside of what this returns.
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(_Deferred(module), device_ids=ids, gradient_as_bucket_view=True)
