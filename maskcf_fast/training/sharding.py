"""Parameters divided among the processes (PyTorch's FSDP2), for models that do not fit on one device.

A block's parameters are put together when it runs, and its gradients are averaged and divided again behind it.
Every process must therefore run a model equally often. No device ever holds a whole model: the method is built on the
meta device, divided there, and filled tensor by tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.processes import Processes
from ..core.tensors import save_tensors
from ..methods import Method
from ..models import ImageClassifier, VisionTransformer


def shard(method: Method, processes: Processes) -> None:
    """Divide the parameters of all of the method's models, in place; they may lie on the meta device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # A block also returns what its attention read: views that nobody writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for module in list(method.modules()):
        if isinstance(module, VisionTransformer):
            for block in module.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
            for name in ("embed_rows", "encode"):
                register_fsdp_forward_method(module, name)
    for module in list(method.modules()):
        if isinstance(module, ImageClassifier):
            fully_shard(module.head, mesh=mesh)


@torch.no_grad()
def fill(method: Method, weights: Mapping[str, Tensor] | None, processes: Processes) -> None:
    """Give a divided method that lies on the meta device its memory, and its models the initial weights.

    Args:
        method: Its teacher, if any, is a classifier or a backbone.
        weights: Those of the classifier, on the CPU of the main process; None in the others.
        processes: Those that share the parameters.
    """
    from torch.distributed.tensor import distribute_tensor

    method.to_empty(device=processes.device)
    models: list[Mapping[str, Tensor]] = [method.student.state_dict()]
    if method.average is not None:
        models.append(method.average.state_dict())
    if method.teacher is not None:
        prefix = "" if isinstance(method.teacher, ImageClassifier) else "backbone."
        models.append({prefix + name: tensor for name, tensor in method.teacher.state_dict().items()})
    for name in models[0]:
        own: Any = models[0][name]
        whole = torch.empty(own.shape, dtype=own.dtype, device=processes.device)
        if weights is not None:
            whole.copy_(weights[name])
        part = distribute_tensor(whole, own.device_mesh, own.placements).to_local()
        for model in models:
            if name in model:
                local_rows(model[name])[0].copy_(part)


def full(tensor: Any) -> Tensor:
    """A divided tensor put together, which all processes call alike; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_rows(tensor: Any) -> tuple[Tensor, int | None]:
    """This process's rows of a divided tensor, and the number of the first; of a whole one all of them, and None."""
    if not hasattr(tensor, "to_local"):
        return tensor, None
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk divides
    return tensor.to_local(), min(tensor.device_mesh.get_local_rank() * chunk, tensor.shape[0])


def save_full(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str], processes: Processes) -> None:
    """Write a model, put together tensor by tensor; all processes call this alike. Errors as `save_tensors`."""
    left = list(state.values())

    def write() -> None:
        try:
            if processes.main:
                save_tensors(path, state, metadata, read=lambda _: full(left.pop(0)))
        finally:
            for tensor in left:  # every process takes part in every exchange, also where writing has failed
                full(tensor)

    processes.together(write)
