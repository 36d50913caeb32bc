"""The processes of a run: one, or several started by torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError


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
            raise UserError(f"device must be cpu, cuda or auto, got {device!r}") from error
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError(f"device={device!r}, but torch sees no GPU: use --device cpu")
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
