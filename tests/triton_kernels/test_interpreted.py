"""What is particular to the Triton kernels; tests/ops holds them to the contract along with all others."""

from importlib import import_module

import cases
import pytest
import torch

import maskcf_fast as mf

gather, patchify, refill, relevance, select = (
    import_module(f"maskcf_fast.ops.{name}.triton") for name in ("gather", "patchify", "refill", "relevance", "select")
)


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
    with pytest.raises(RuntimeError, match="up to 128 wide, got d=160"):
        mf.attention_relevance(**cases.relevance_case(d=160)(), impl="triton")


def op_calls():
    image = cases.refill_case(2, 3, (2, 2), (4, 4))()
    tokens = cases.gather_case(3, 4, 3, fill="multi")()
    cam = cases.random_cam(2, 4)
    layer = cases.relevance_case(1, 2, 5, 4)()
    tensors = [layer[name] for name in ("q", "k", "v", "grad_out", "relevance")]
    bytes_ = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    grid = list(image["grid"])
    return {
        "select": (select.select, (cam, 0.3, None, "object")),
        "refill": (refill.refill, (image["images"], image["mask"], image["donors"], grid)),
        "fused": (refill.select_and_refill, (image["images"], cam, image["donors"], None, 2, "object", grid)),
        "patchify": (patchify.patchify_op, (bytes_, 2, [0.5] * 3, [0.2] * 3, torch.float32, None, None)),
        "gather": (gather.gather, (tokens["tokens"].requires_grad_(), tokens["mask"], tokens["donors"])),
        "gather_backward": (gather.gather_backward, (tokens["tokens"].detach(), tokens["mask"], tokens["donors"])),
        "relevance": (relevance.relevance_op, (*tensors, 0.5)),
    }


@pytest.mark.parametrize("name", ["select", "refill", "fused", "patchify", "gather", "gather_backward", "relevance"])
def test_opcheck_and_a_whole_graph(name):
    torch.use_deterministic_algorithms(False)
    op, arguments = op_calls()[name]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=checks)
    compiled = torch.compile(lambda *x: op(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), op(*arguments), rtol=0, atol=0, equal_nan=True)
