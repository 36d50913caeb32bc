"""What is particular to the Triton kernels; tests/ops holds them to the contract along with all others."""

from importlib import import_module

import cases
import pytest
import torch

import maskcf_fast as mf

relevance = import_module("maskcf_fast.ops.relevance.triton")


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN or the largest integer
    yield
    torch.use_deterministic_algorithms(False)


def same_bytes(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    )


def close(got, truth, same_dtype, floor=1e-12):
    """No further from the truth than twice what torch is in the same precision."""
    error, allowed = ((x.double() - truth.double()).norm() for x in (got, same_dtype))
    assert error <= 2 * allowed + floor * truth.double().norm(), (error, allowed)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in cases.RELEVANCE_CASES if "float64" not in name])
def test_relevance_is_as_precise_as_torch(name, splits, monkeypatch):
    arguments = cases.RELEVANCE_CASES[name]()
    monkeypatch.setattr(relevance, "head_splits", lambda programs, heads, device: min(splits, heads))
    got = mf.attention_relevance(**arguments, impl="triton")
    assert got.dtype == torch.float32
    torch_error = mf.attention_relevance(**arguments, impl="reference")
    close(got, cases.true_relevance(**arguments), torch_error, floor=2**-24)
    assert same_bytes(got, mf.attention_relevance(**arguments, impl="triton"))


def test_relevance_says_what_it_lacks():
    with pytest.raises(RuntimeError, match="no kernel for float64"):
        mf.attention_relevance(**cases.relevance_case(dtype=torch.float64)(), impl="triton")
    with pytest.raises(RuntimeError, match="at most 128 wide, got d=160"):
        mf.attention_relevance(**cases.relevance_case(d=160)(), impl="triton")
