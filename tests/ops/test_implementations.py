"""Every implementation of every op against the truths of cases.py, eager and compiled, with poisoned outputs.

Without a GPU, Triton's kernels are run by its interpreter, in a process that tests/triton_kernels starts.
"""

from __future__ import annotations

import itertools
import mmap
import os
import warnings

import cases
import pytest
import torch
from torch import Tensor

import maskcf_fast as mf
from maskcf_fast.ops import dispatch, extension

GPU = torch.cuda.is_available()
EMULATED = extension.emulated()  # the CUDA kernels run on the CPU: tests/native
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(extension.why_not("cpu") is not None, reason="extension not built")),
    pytest.param("cuda", marks=pytest.mark.skipif(not (GPU or EMULATED), reason="no GPU, and not emulated")),
    pytest.param("triton", marks=pytest.mark.skipif(not (GPU or INTERPRETED), reason="no GPU, and not interpreted")),
]
MODES = ["eager", "compiled"]
COMPILED_CASES = {
    "7x7",
    "single-float32-nchw",
    "single-float32-nhwc",
    "window",
    "uint8-to-bfloat16",
    "multi",
    "float32",
}


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, or the largest integer: an element that nothing writes is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what turns the filling on
    yield
    torch.use_deterministic_algorithms(False)


def device_of(impl: str) -> str:
    on_cpu = {"cuda": EMULATED, "triton": INTERPRETED}
    return "cpu" if on_cpu.get(impl, True) else "cuda"


def run(op, impl: str, mode: str, arguments: dict):
    """Call an op on the device of ``impl``; the result comes back to the CPU."""
    arguments = {k: v.to(device_of(impl)) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    if mode == "compiled":
        torch.compiler.reset()
        op = torch.compile(op, fullgraph=True, backend="aot_eager" if impl != "reference" else "eager")
    result = op(**arguments, impl=impl)
    return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()


def grid_of(names, compiled=COMPILED_CASES):
    """All cases eagerly, a few of each op compiled (tracing does not depend on the values)."""
    return [(name, mode) for name, mode in itertools.product(names, MODES) if mode == "eager" or name in compiled]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (x.clone(memory_format=torch.contiguous_format).flatten() for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("region", ["object", "context"])
@pytest.mark.parametrize("name", cases.CAMS)
def test_masks_are_identical(name, region, impl):
    cam = cases.CAMS[name]()
    for cut in cases.CUTS.values():
        arguments = cases.cut_for(cut, cam.shape[1]) | {"region": region}
        mask = run(mf.select_patches, impl, "eager", {"cam": cam} | arguments)
        assert torch.equal(mask, cases.true_mask(cam, **arguments)), arguments
    if name in COMPILED_CASES:
        for cut in ("t0.3", "khalf"):
            arguments = cases.cut_for(cases.CUTS[cut], cam.shape[1]) | {"region": region}
            mask = run(mf.select_patches, impl, "compiled", {"cam": cam} | arguments)
            assert torch.equal(mask, cases.true_mask(cam, **arguments))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "mode"), grid_of(cases.REFILL_CASES))
def test_refill_is_exact(name, mode, impl):
    arguments = cases.REFILL_CASES[name]()
    before = arguments["images"].clone()
    out = run(mf.refill_patches, impl, mode, arguments)
    assert same_bits(out, cases.true_refill(**arguments))
    assert out.is_contiguous(memory_format=torch.channels_last) or not name.endswith("nhwc")
    assert same_bits(arguments["images"], before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cut", [{"threshold": 0.3}, {"top_k": 3}, {"top_k": 0}, {"top_k": 16}])
@pytest.mark.parametrize(
    ("cam", "region", "mode"),
    [*itertools.product(["random", "nan", "zeros", "half"], ["object", "context"], ["eager"]),
     ("random", "object", "compiled")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["single-float32-nchw", "multi-uint8-nhwc", "one_image", "expanded", "window"])
def test_select_and_refill_as_one(name, cam, mode, region, cut, impl):
    arguments = cases.REFILL_CASES[name]()
    n, num_patches = arguments.pop("mask").shape
    maps = {
        "random": cases.random_cam(n, num_patches),
        "nan": torch.full((n, num_patches), torch.nan),
        "zeros": torch.zeros(n, num_patches),
        "half": cases.random_cam(n, num_patches, torch.float16),
    }
    selection = cut | {"region": region}
    out, mask = run(mf.counterfactual_refill, impl, mode, arguments | selection | {"cam": maps[cam]})
    expected = cases.true_mask(maps[cam], **selection)
    assert torch.equal(mask, expected)
    assert same_bits(out, cases.true_refill(mask=expected, **arguments))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", cases.ACCESS_CASES)
def test_select_and_refill_in_every_access_width(name, dtype, impl):
    arguments = cases.ACCESS_CASES[name]()
    cam = cases.random_cam(*arguments.pop("mask").shape, dtype)
    out, mask = run(mf.counterfactual_refill, impl, "eager", arguments | {"cam": cam, "threshold": 0.5})
    expected = cases.true_mask(cam, threshold=0.5, region="object")
    assert torch.equal(mask, expected)
    assert same_bits(out, cases.true_refill(mask=expected, **arguments))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "mode"), grid_of(cases.PATCHIFY_CASES))
def test_patchify_is_exact(name, mode, impl):
    arguments = cases.PATCHIFY_CASES[name]()
    out = run(mf.patchify, impl, mode, arguments)
    expected = cases.true_patchify(**arguments)
    # PyTorch divides by a constant by multiplying there; the interpreter cuts bfloat16 off where a GPU rounds.
    if impl == "cuda" or mode == "compiled" or (impl == "triton" and (GPU or out.dtype == torch.bfloat16)):
        torch.testing.assert_close(out, expected)
    else:
        assert out.dtype == expected.dtype
        assert same_bits(out, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "mode"),
    grid_of(cases.GATHER_CASES, {"single-float32", "multi-bfloat16", "prefix_0-multi", "prefix_5-single"}),
)
def test_gather_is_exact_and_so_is_its_gradient(name, mode, impl):
    arguments = cases.GATHER_CASES[name]()
    tokens = arguments["tokens"].detach().requires_grad_()
    out = run(mf.gather_tokens, impl, mode, arguments | {"tokens": tokens})
    assert same_bits(out, cases.true_gather(**arguments))
    grad_out = torch.randn(out.shape, generator=cases.generator(3)).to(out.dtype)
    out.backward(grad_out)
    exact = cases.true_gather_grad(grad_out, **{name: arguments[name] for name in ("mask", "donors", "prefix")})
    # Sums of up to N values: in the gradient's dtype for the reference, in float32 or better and then rounded once for
    # the kernels (the interpreter cuts bfloat16 off).
    eps, size = torch.finfo(out.dtype).eps, exact.abs().max().clamp(min=1)
    error = (tokens.grad.double() - exact).abs()
    if impl == "reference":
        assert error.max() <= 2 * len(exact) * eps * size
    else:
        wide = torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
        once = eps if impl == "triton" and not GPU else eps / 2
        assert (error <= once * exact.abs() + len(exact) * wide * size).all()
    again = tokens.detach().requires_grad_()
    run(mf.gather_tokens, impl, mode, arguments | {"tokens": again}).backward(grad_out)
    assert same_bits(tokens.grad, again.grad), "not deterministic"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("fill", "prefix"), [("single", 1), ("multi", 0), ("repeated", 2)])
def test_gather_twice_differentiable(fill, prefix, impl):
    tokens, mask, donors, _ = cases.gather_case(3, 3, 2, torch.float64, fill, prefix=prefix)().values()
    device = device_of(impl)
    inputs = tokens.to(device).requires_grad_()

    def op(t):
        return mf.gather_tokens(t, mask.to(device), donors.to(device), prefix=prefix, impl=impl)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def relevance_error(out: Tensor, arguments: dict) -> float:
    exact = cases.true_relevance(**arguments)
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize(
    ("name", "mode"), grid_of({**cases.RELEVANCE_CASES, **cases.LARGE_RELEVANCE_CASES}, {"float32", "start"})
)
def test_relevance_errs_at_most_twice_as_much_as_torch(name, mode, impl):
    arguments = {**cases.RELEVANCE_CASES, **cases.LARGE_RELEVANCE_CASES}[name]()
    if impl != "cpu" and arguments["q"].dtype == torch.float64:
        with pytest.raises(RuntimeError, match="no kernel for float64"):
            run(mf.attention_relevance, impl, mode, arguments)
        return
    if impl == "triton" and INTERPRETED and name in cases.LARGE_RELEVANCE_CASES:
        pytest.skip("takes minutes in the interpreter")
    out = run(mf.attention_relevance, impl, mode, arguments)
    assert out.dtype == (torch.float64 if arguments["q"].dtype == torch.float64 else torch.float32)
    torchs = relevance_error(mf.attention_relevance(**arguments, impl="reference"), arguments)
    # The floor is a rounding of the result: where torch happens to err by less, nothing is wrong.
    assert relevance_error(out, arguments) <= max(2 * torchs, 2 * torch.finfo(out.dtype).eps)
    assert same_bits(out, run(mf.attention_relevance, impl, mode, arguments)), "not deterministic"


@pytest.mark.skipif(not EMULATED, reason="a GPU has the shared memory that it has")
@pytest.mark.parametrize("limit", [64 << 10, 99 << 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_relevance_knows_what_shared_memory_cuda_takes(limit, dtype, monkeypatch):
    from maskcf_fast.ops.relevance.limits import lacks_shared

    monkeypatch.setenv("MASKCF_EMULATOR_SHARED", str(limit))
    for d in range(1, 129, 7):
        arguments = cases.relevance_case(1, 1, 3, d, dtype=dtype)()
        if lacks_shared(limit, dtype, d):
            with pytest.raises(RuntimeError, match=f"a block may have {limit} bytes"):
                run(mf.attention_relevance, "cuda", "eager", arguments)
        else:
            run(mf.attention_relevance, "cuda", "eager", arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "grad_out", "relevance"])
@pytest.mark.parametrize(("tq", "dtype"), [(None, torch.float32), (1, torch.float32), (None, torch.float16)])
def test_a_nan_reaches_the_relevance(where, bad, tq, dtype, impl):
    """Non-finite input is seen in the image it belongs to, and nowhere else."""
    arguments = cases.relevance_case(tq=tq, dtype=dtype)()
    arguments[where].view(2, -1)[1, 0] = bad
    out = run(mf.attention_relevance, impl, "eager", arguments)
    assert out[0].isfinite().all()
    assert torch.equal(out.isfinite(), mf.attention_relevance(**arguments, impl="reference").isfinite())


@pytest.mark.parametrize("impl", IMPLS)
def test_relevance_is_not_narrowed_by_autocast(impl):
    arguments = cases.relevance_case()()
    expected = run(mf.attention_relevance, impl, "eager", arguments)
    with torch.autocast(device_of(impl), torch.bfloat16):
        assert same_bits(run(mf.attention_relevance, impl, "eager", arguments), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_refilled_pixels_are_cut_off_from_the_graph(impl):
    arguments = cases.refill_case(dtype=torch.float32)()
    arguments["images"].requires_grad_()
    assert not run(mf.refill_patches, impl, "eager", arguments).requires_grad


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_relevance_does_not_depend_on_the_number_of_threads(impl):
    arguments = cases.relevance_case(3, 5, 70, 32)()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(mf.attention_relevance, impl, "eager", arguments))
    torch.set_num_threads(1)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


ROWS = ("bias_gelu", "residual_norm")  # of rows, without kernels in CUDA


def opcheck_arguments(device: str) -> dict[str, tuple]:
    """Arguments of each registered op."""
    images, mask, donors, grid = cases.refill_case()().values()
    tokens, token_mask, token_donors, _ = cases.gather_case(prefix=2)().values()
    q, k, v, grad_out, row, _ = cases.relevance_case()().values()
    cam = cases.random_cam(5, 16)
    pixels = cases.PATCHIFY_CASES["multi"]()
    found = {
        "select_patches": (cam, 0.3, None, False),
        "refill_patches": (images.nan_to_num(), mask, donors, *grid),
        "counterfactual_refill": (images.nan_to_num(), cam, donors, 0.3, None, False, *grid),
        "patchify": (pixels["images"], 4, pixels["mean"], pixels["std"], torch.float32, pixels["mask"],
                     pixels["donors"]),
        "gather_tokens": (tokens.requires_grad_(), token_mask, token_donors, 2),
        "gather_tokens_backward": (tokens.detach().requires_grad_(), token_mask, token_donors, 2),
        "attention_relevance": (q, k, v, grad_out, row, 0.3),
        "bias_gelu": (tokens.detach(), torch.rand(tokens.shape[-1]), 1),
        "bias_gelu_backward": (tokens.detach(), tokens.detach(), torch.rand(tokens.shape[-1]), 1),
        "residual_norm": (*[tokens.detach()] * 2, *[torch.rand(tokens.shape[-1])] * 2, 1e-5),
        "residual_norm_backward": (*[tokens.detach()] * 3, torch.rand(tokens.shape[-1]), 1e-5),
    }  # fmt: skip
    return {
        op: tuple(x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in given)
        for op, given in found.items()
    }


@pytest.mark.parametrize(
    ("op", "impl"),
    [
        pytest.param(op, *impl.values, marks=impl.marks)
        for op, impl in itertools.product(opcheck_arguments("cpu"), IMPLS[1:])
        if not (op.startswith(ROWS) and impl.values == ("cuda",))
    ],
)
def test_opcheck(op, impl):
    namespace = getattr(torch.ops, dispatch.NAMESPACES[impl])
    torch.library.opcheck(getattr(namespace, op), opcheck_arguments(device_of(impl))[op])


@pytest.mark.parametrize("impl", [impl for impl in IMPLS[1:] if impl.values != ("cuda",)])
@pytest.mark.parametrize("op", [op for op in opcheck_arguments("cpu") if op.startswith(ROWS)])
def test_rows_of_any_layout_give_the_layout_that_is_traced(op, impl):
    arguments = opcheck_arguments(device_of(impl))[op]
    rows = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.ndim > 1]
    namespace = getattr(torch.ops, dispatch.NAMESPACES[impl])
    for turned in (rows, *([i] for i in rows)):
        given = [x.mT.contiguous().mT if i in turned else x for i, x in enumerate(arguments)]
        torch.library.opcheck(getattr(namespace, op), tuple(given), test_utils="test_faketensor")


@pytest.mark.skipif(extension.why_not("cpu") is not None, reason="extension not built")
@pytest.mark.parametrize("op", ["refill_patches", "gather_tokens", "gather_tokens_backward"])
def test_a_donor_outside_the_batch_cannot_reach_memory(op):
    """Under torch.compile the public check reads no values; the CPU kernels check again."""
    arguments = opcheck_arguments("cpu")[op]
    for wrong in (-1, 5):
        with pytest.raises(RuntimeError, match=f"csrc.*donors must index the batch, 0 to 4, got {wrong}"):
            getattr(torch.ops.maskcf, op)(*arguments[:2], torch.full((5,), wrong), *arguments[3:])


@pytest.mark.skipif(INTERPRETED or GPU, reason="for the ops on the CPU")
@pytest.mark.parametrize("impl", IMPLS[:2])
def test_storage_that_must_not_be_written(impl, tmp_path):
    """Every input in a read-only mapping: a stray write would end the process."""

    def locked(x: Tensor) -> Tensor:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.write_bytes(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return torch.frombuffer(mapped, dtype=x.dtype).view(x.shape)

    def agree(op, arguments, truth):
        held = {name: locked(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        torch.testing.assert_close(op(**held, impl=impl), truth, rtol=1e-5, atol=1e-6, equal_nan=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        image, tokens, layer = cases.refill_case()(), cases.gather_case()(), cases.relevance_case()()
        pixels = cases.PATCHIFY_CASES["multi"]()
        cam = cases.random_cam(5, 16)
        mask = cases.true_mask(cam, region="object", threshold=0.3)
        agree(mf.select_patches, {"cam": cam, "threshold": 0.3}, mask)
        agree(mf.refill_patches, image, cases.true_refill(**image))
        refilled = cases.true_refill(image["images"], mask, image["donors"], image["grid"])
        both = {k: v for k, v in image.items() if k != "mask"} | {"cam": cam, "threshold": 0.3}
        agree(mf.counterfactual_refill, both, (refilled, mask))
        agree(mf.patchify, pixels, cases.true_patchify(**pixels))
        agree(mf.gather_tokens, tokens, cases.true_gather(**tokens))
        agree(mf.attention_relevance, layer, cases.true_relevance(**layer).float())
