"""Tensors of more than 2³¹ elements, where an offset no longer fits into 32 bits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_implementations import IMPLS, INTERPRETED, device_of

import maskcf_fast as mf

LARGE = 2**31
NEEDED = 12 << 30  # bytes: the tensor, the result, and some air


@pytest.fixture(autouse=True)
def _enough_memory(request):
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) << 10
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory, there are {free / 2**30:.1f}")
    if INTERPRETED:
        pytest.skip("takes minutes in the interpreter")


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("fused", [False, True])
def test_refill(fused, impl):
    """Every image is filled with its index, so that a wrong address shows wherever it points."""
    n, side = 9, 2**14
    images = torch.empty(n, 1, side, side, dtype=torch.uint8, device=device_of(impl))
    assert images.numel() > LARGE
    for i in range(n):
        images[i] = i
        images[i, 0, -1, -1] = 100 + i
    donors = torch.arange(n - 1, -1, -1, device=images.device)
    cam = torch.tensor([0.0, 0.1, 0.2, 1.0], device=images.device).expand(n, 4)
    if fused:
        out, mask = mf.counterfactual_refill(images, cam, donors, top_k=2, impl=impl)
        assert mask.tolist() == [[False, False, True, True]] * n
    else:
        out = mf.refill_patches(images, cam > 0.15, donors, impl=impl)
    half = side // 2
    for i in range(n):
        assert (out[i, 0, :half] == i).all()
        assert (out[i, 0, half:].flatten()[:-1] == n - 1 - i).all()
        assert out[i, 0, -1, -1] == 100 + n - 1 - i


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_gather(impl):
    tokens = torch.empty(2, 1 + 2**10, 2**20, dtype=torch.bfloat16, device=device_of(impl))
    assert tokens.numel() > LARGE
    tokens[0], tokens[1] = 1, 2
    mask = torch.zeros(2, 2**10, dtype=torch.bool, device=tokens.device)
    mask[:, -1] = True
    with torch.no_grad():
        out = mf.gather_tokens(tokens, mask, torch.tensor([1, 0], device=tokens.device), impl=impl)
    del tokens
    for i in range(2):
        low, high = out[i].aminmax(dim=1)
        assert torch.equal(low, high)
        assert low.tolist() == [1 + i] * 2**10 + [2 - i]
