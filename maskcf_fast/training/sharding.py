"""Parameters divided among the processes (PyTorch's FSDP2), for models that do not fit on one device.

A block's parameters are put together when it runs, and its gradients are averaged and divided again behind it.
Every process must therefore run a model equally often.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.processes import Processes
from ..methods import Method
from ..models import ImageClassifier, VisionTransformer


def shard(method: Method, processes: Processes) -> None:
    """Divide the parameters of all of the method's models, in place."""
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


def whole(state: Any) -> Any:
    """A state with every divided tensor put together; all processes call this alike. Others stay as they are."""
    return tree_map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x, state)


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as ``like`` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spec = cast(Any, like)
    return distribute_tensor(tensor.to(like.device), spec.device_mesh, spec.placements)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``model.load_state_dict`` of whole tensors."""
    model.load_state_dict({name: divided(state[name], own) for name, own in model.state_dict().items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole tensors; whether a graph captures it stays as it is."""
    own = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]
    parameters: Iterable[Tensor] = (p for group in optimizer.param_groups for p in group["params"])
    moments = {
        index: {
            name: divided(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value
            for name, value in state["state"].get(index, {}).items()
        }
        for index, p in enumerate(parameters)
    }
    optimizer.load_state_dict({**state, "state": {index: values for index, values in moments.items() if values}})
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        rate = float(group["lr"])
        group |= kept
        group["lr"] = kept["lr"].fill_(rate) if isinstance(kept["lr"], Tensor) else rate
