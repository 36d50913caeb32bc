"""Several processes, each with a whole model: the same weights at the start, the same gradients at each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.processes import Processes

BUCKET_BYTES = 25 << 20  # small enough to be sent while the next is put together, large enough to be sent fast


@torch.no_grad()
def broadcast_state(module: nn.Module, processes: Processes) -> None:
    """Give every process the parameters and buffers of the first."""
    if processes.world_size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def average_gradients(
    parameters: Iterable[nn.Parameter], processes: Processes, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Average ``grad`` over the processes, in place, once the step's last backward pass is done.

    A parameter without a gradient is left out: all processes take the same step, so that it has none on any. The
    buckets take as much memory as the gradients, where the activations lay before.
    """
    if processes.world_size == 1:
        return
    sent = []
    for grads in _buckets([p.grad for p in parameters if p.grad is not None], bucket_bytes):
        flat = torch.cat([grad.flatten() for grad in grads]).div_(processes.world_size)
        sent.append((grads, flat, dist.all_reduce(flat, async_op=True)))
    for grads, flat, work in sent:
        assert work is not None
        work.wait()
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def _buckets(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together of at most ``limit`` bytes or alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) + tensor.nbytes > limit):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
