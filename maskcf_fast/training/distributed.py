"""The processes of a run: one, or several started by torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distill.methods import run


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: str) -> Processes:
        """Join the group that torchrun's environment describes (gloo on a CPU, NCCL on a GPU), or run alone.

        Raises:
            ValueError: ``device`` is unknown, or there is no such device.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            chosen = torch.device(kind)
        except RuntimeError as error:
            raise ValueError(f"device must be cpu, cuda or auto, got {device!r}") from error
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"device={device!r}, but torch sees no GPU: use --device cpu")
            if chosen.index is None:
                chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", "0")), world_size, chosen)

    @property
    def main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def stop(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # DistributedDataParallel keeps gloo's threads alive. One that still lets go of a tensor while the
            # interpreter ends would abort the process.
            time.sleep(0.5)


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
