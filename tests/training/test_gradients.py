"""Weights and gradients of two processes over gloo, each with a whole model."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from maskcf_fast.core.processes import Processes
from maskcf_fast.training.distributed import average_gradients, broadcast_state

NAMES = ("first", "bf16", "second", "unused", "frozen")


def parameters(rank):
    """Different on each process: weights, and gradients of two dtypes."""
    torch.manual_seed(rank)
    module = nn.ParameterDict({name: nn.Parameter(torch.randn(3, 5).mT) for name in NAMES})
    module["bf16"] = nn.Parameter(torch.randn(7).bfloat16())
    module["frozen"].requires_grad_(False)
    for name in ("first", "bf16", "second"):
        module[name].grad = torch.randn_like(module[name])
    return module


def work(rank, port, path, bucket_bytes):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = Processes.start("cpu")
    module = parameters(rank)
    module.register_buffer("statistics", torch.full((2,), float(rank)))
    broadcast_state(module, processes)
    average_gradients(module.parameters(), processes, bucket_bytes)
    torch.save((module.state_dict(), {name: p.grad for name, p in module.named_parameters()}), f"{path}/{rank}.pt")
    processes.stop()


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_both_have_the_first_ones_weights_and_the_mean_gradient(bucket_bytes, port, tmp_path):
    mp.spawn(work, (port, str(tmp_path), bucket_bytes), nprocs=2)
    zero, one = parameters(0), parameters(1)
    for rank in range(2):
        weights, grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert weights.pop("statistics").tolist() == [0, 0]
        for name in NAMES:
            assert torch.equal(weights[name], zero[name]), name
            if name in ("unused", "frozen"):
                assert grads[name] is None
            else:
                torch.testing.assert_close(grads[name], (zero[name].grad + one[name].grad) / 2)
