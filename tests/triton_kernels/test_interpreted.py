"""Every op's Triton kernels against the definitions, on the shared cases. Outputs are filled with NaN first."""

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


@pytest.mark.parametrize("region", ["object", "context"])
@pytest.mark.parametrize("cut", cases.CUTS)
@pytest.mark.parametrize("name", cases.CAMS)
def test_masks_are_identical(name, cut, region):
    cam = cases.CAMS[name]()
    arguments = cases.cut_for(cases.CUTS[cut], cam.shape[1]) | {"region": region}
    assert torch.equal(mf.select_patches(cam, **arguments, impl="triton"), cases.true_mask(cam, **arguments))


@pytest.mark.parametrize("name", cases.REFILL_CASES)
def test_refill_is_a_copy(name):
    arguments = cases.REFILL_CASES[name]()
    images, grid = arguments["images"], arguments["grid"]
    before = images.clone()
    out = mf.refill_patches(**arguments, impl="triton")
    assert same_bytes(out, cases.true_refill(**arguments))
    assert out.stride() == mf.refill_patches(**arguments, impl="reference").stride()
    assert same_bytes(images, before)
    cam = cases.random_cam(len(images), arguments["mask"].shape[1], seed=1)
    cam[-1, 0] = float("nan")
    for cut in ({"threshold": 0.1}, {"top_k": cam.shape[1] // 2, "region": "context"}):
        truth = cases.true_mask(cam, **{"region": "object"} | cut)
        out, mask = mf.counterfactual_refill(images, cam, arguments["donors"], grid=grid, **cut, impl="triton")
        assert torch.equal(mask, truth)
        assert same_bytes(out, cases.true_refill(images, truth, arguments["donors"], grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("patch", [14, 16])
def test_refill_of_many_tiles(patch, dtype):
    """Units that straddle patches, a last tile that is not full, and donors from far away."""
    arguments = cases.refill_case(3, 3, (7, 8), (patch, patch), dtype, "multi")()
    assert same_bytes(mf.refill_patches(**arguments, impl="triton"), cases.true_refill(**arguments))


@pytest.mark.parametrize("offset", [1, 2, 3, 8])
def test_refill_of_unaligned_storage(offset):
    arguments = cases.refill_case(2, 3, (2, 2), (16, 16), torch.uint8)()
    storage = torch.zeros(arguments["images"].numel() + offset, dtype=torch.uint8)
    images = storage[offset:].view(arguments["images"].shape).copy_(arguments["images"])
    assert same_bytes(
        mf.refill_patches(**arguments | {"images": images}, impl="triton"), cases.true_refill(**arguments)
    )


@pytest.mark.parametrize("name", cases.PATCHIFY_CASES)
def test_rows_are_identical(name):
    arguments = cases.PATCHIFY_CASES[name]()
    rows, truth = mf.patchify(**arguments, impl="triton"), cases.true_patchify(**arguments)
    assert rows.dtype == truth.dtype
    if rows.dtype == torch.bfloat16:  # the interpreter cuts bfloat16 off where a GPU rounds
        bits = rows.view(torch.int16).int() - truth.view(torch.int16).int()
        assert rows.signbit().equal(truth.signbit())
        assert bits.min() >= -1
        assert bits.max() <= 0
    else:
        assert torch.equal(rows, truth)


@pytest.mark.parametrize("name", cases.GATHER_CASES)
def test_gather_and_its_gradient(name):
    arguments = cases.GATHER_CASES[name]()
    mask, donors = arguments["mask"], arguments["donors"]
    grad = torch.randn(arguments["tokens"].shape, generator=cases.generator(1)).to(arguments["tokens"].dtype)
    grads = {}
    for impl in ("triton", "reference"):
        tokens = arguments["tokens"].detach().clone().requires_grad_()
        out = mf.gather_tokens(tokens, mask, donors, impl=impl)
        assert same_bytes(out.detach(), cases.true_gather(**arguments))
        out.backward(grad)
        grads[impl] = tokens.grad
    close(grads["triton"], cases.true_gather_grad(grad.clone(), mask, donors), grads["reference"])
    again = gather.gather_backward(grad, mask, donors)
    assert same_bytes(again, grads["triton"])


@pytest.mark.parametrize("fill", ["single", "multi", "repeated"])
def test_gather_gradcheck(fill):
    arguments = cases.gather_case(3, 4, 3, torch.float64, fill)()
    tokens = arguments.pop("tokens").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mf.gather_tokens(x, **arguments, impl="triton"), tokens)
    assert torch.autograd.gradgradcheck(lambda x: mf.gather_tokens(x, **arguments, impl="triton"), tokens)


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


@pytest.mark.parametrize("tq", [None, 1])
def test_nan_is_not_hidden(tq):
    arguments = cases.relevance_case(2, 2, 10, 16, tq=tq)()
    arguments["q"][1, 0, 0, 0] = float("nan")
    out = mf.attention_relevance(**arguments, impl="triton")
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


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
