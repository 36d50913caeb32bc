"""residual_norm against the definition in float64, and its gradients against autograd's of that."""

from __future__ import annotations

import math
from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from test_implementations import IMPLS, INTERPRETED, device_of, poisoned  # noqa: F401
from torch import Tensor

import maskcf_fast as mf

IMPLS = [impl for impl in IMPLS if impl == "reference" or impl.values != ("cuda",)]  # there is no kernel in CUDA
SHAPES = {"two": (2,), "short": (3, 5), "lanes": (4, 2, 64), "odd": (70, 131), "blocks": (2, 67, 300)}
EPS = 1e-5


def by_definition(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    total = x + branch
    off = total - total.mean(dim=-1, keepdim=True)
    return total, off / (off.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, branch, weight, bias and the gradients of both results; the rows lie off zero, and one is nearly constant."""
    g = cases.generator(len(shape))
    x, branch, *grads = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    if len(shape) > 1:
        x[0], branch[0] = 1e-3 * x[0], 1e-3 * branch[0]
    x = x + 3
    weight, bias = (torch.randn(shape[-1], generator=g, dtype=torch.float64) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = ((t.to(device, kind) for t in ts) for ts, kind in (((x, branch), dtype), ((weight, bias), wide)))
    return [*rows, *columns, *(grad.to(device, dtype) for grad in grads)]


def outcome(function, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *grads: Tensor) -> list[Tensor]:
    """Both results and all gradients, in float64 on the CPU."""
    given = [t.detach().clone().requires_grad_() for t in (x, branch, weight, bias)]
    out = function(*given)
    assert [(o.dtype, o.shape) for o in out] == [(x.dtype, x.shape)] * 2
    gradients = torch.autograd.grad(out, given, grads)
    assert [g.dtype for g in gradients] == [t.dtype for t in given]
    return [t.detach().double().cpu() for t in (*out, *gradients)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_16_bits_is_read_and_written_exactly(dtype, impl):
    """The sum of each with 0, and with values at random: that in float32, rounded to the nearest."""
    if impl == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bf16 off instead of rounding it")
    g, device = cases.generator(0), device_of(impl)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(64, 1024)
    weight, bias = torch.ones(1024, device=device), torch.zeros(1024, device=device)
    others = [torch.randint(-(2**15), 2**15, every.shape, generator=g).to(torch.int16).view(dtype) for _ in range(7)]
    for other in (torch.zeros_like(every), *others):
        total = mf.residual_norm(every.to(device), other.to(device), weight, bias, impl=impl)[0].cpu()
        want = (every.float() + other.float()).to(dtype)
        assert torch.equal(total.isnan(), want.isnan())
        numbers = ~want.isnan()
        assert torch.equal(total.view(torch.int16)[numbers], want.view(torch.int16)[numbers])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "mode"), [*((s, "eager") for s in SHAPES), ("odd", "compiled")])
def test_values_and_gradients(shape, mode, dtype, impl):
    """The sum is PyTorch's; all else is within the dtype's rounding, and a few of the statistics' dtype's."""
    x, branch, weight, bias, *grads = arguments(SHAPES[shape], dtype, device_of(impl))
    op = mf.residual_norm
    if mode == "compiled":
        torch.compiler.reset()
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    found = outcome(partial(op, eps=EPS, impl=impl), x, branch, weight, bias, *grads)
    total, zero = x + branch, torch.zeros_like(x)  # what is normalised is the rounded sum
    truth = outcome(by_definition, *(t.double() for t in (total, zero, weight, bias, *grads)))
    cut = INTERPRETED and impl == "triton" and dtype == torch.bfloat16  # the interpreter cuts it off
    if not cut:
        assert torch.equal(found[0], total.double().cpu())
    scale = 1 / (truth[0].var(dim=-1, correction=0, keepdim=True) + EPS).sqrt()  # what an error of the mean grows by
    rounding = (1.01 if cut else 0.51) * torch.finfo(dtype).eps
    if cut:  # its sum is another, in the last bit
        rounding, scale = 4 * rounding, scale * 2**16
    inner = 16 * torch.finfo(weight.dtype).eps * (1 + 4 * scale)
    w, tops = weight.double().cpu().abs().max(), [g.double().cpu().abs().amax(dim=-1, keepdim=True) for g in grads]
    slack = [inner * w, *[(1 + scale * w) * inner * (tops[0] + tops[1])] * 2]
    for a, b, extra in zip(found[1:4], truth[1:4], slack, strict=True):
        assert ((a - b).abs() <= rounding * b.abs() + extra).all()
    rows = total.numel() // len(weight)
    assert ((found[4] - truth[4]).abs() <= (inner * tops[1] * 4).reshape(-1, 1).sum()).all()
    assert ((found[5] - truth[5]).abs() <= rows * torch.finfo(weight.dtype).eps * tops[1].max() * 4).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_one_value_and_what_is_no_number(impl):
    x = torch.tensor([[2.0] * 5, [math.inf, 1, 1, 1, 1], [math.nan, 1, 1, 1, 1], [1e30, 0, 0, 0, 0]])
    x, weight = x.to(device_of(impl)), torch.ones(5, device=device_of(impl))
    total, normed = mf.residual_norm(x, torch.zeros_like(x), weight, 0.5 * weight, impl=impl)
    assert torch.equal(total.isnan(), x.isnan())
    assert normed[0].tolist() == [0.5] * 5
    assert normed[1:3].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_layout_and_no_rows(impl):
    device = device_of(impl)
    x, branch = (torch.randn(6, 40, 9, device=device).transpose(0, 2)[:, ::2] for _ in range(2))
    weight, bias = (torch.randn(12, device=device)[::2].requires_grad_() for _ in range(2))
    found = mf.residual_norm(x, branch, weight, bias, impl=impl)
    expected = F.layer_norm(x + branch, (6,), weight, bias)
    torch.testing.assert_close(found, (x + branch, expected), rtol=1e-5, atol=1e-5)
    sum(t.sum() for t in mf.residual_norm(x[:0], branch[:0], weight, bias, impl=impl)).backward()
    assert weight.grad.tolist() == bias.grad.tolist() == [0] * 6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_without_a_branch_it_is_the_norm_of_x_alone(dtype, impl):
    x, _, weight, bias, *grads = arguments(SHAPES["odd"], dtype, device_of(impl))

    def alone(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total, normed = mf.residual_norm(x, None, weight, bias, EPS, impl=impl)
        assert total is x
        return x + 0, normed

    given = (x, torch.zeros_like(x), weight, bias, *grads)
    found, (_, normed, grad, _, *rest) = (
        [
            t.detach().double().cpu()
            for t in (*out, *torch.autograd.grad(out, leaves, grads, allow_unused=True))
            if t is not None
        ]
        for function in (alone, partial(mf.residual_norm, eps=EPS, impl=impl))
        for leaves in [[t.detach().clone().requires_grad_() for t in given[:4]]]
        for out in [function(*leaves)]
    )
    for a, b in zip((found[1], *found[3:]), (normed, *rest), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[2], grad, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", [(0,), (1,)])
def test_one_result_alone_is_used(used, impl):
    x, branch, weight, bias, *grads = arguments((7, 12), torch.float64, device_of(impl))
    given = [t.requires_grad_() for t in (x, branch, weight, bias)]
    found, expected = (
        torch.autograd.grad(function(*given)[used[0]], given, grads[0], materialize_grads=True)
        for function in (partial(mf.residual_norm, impl=impl), by_definition)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_twice_differentiable_and_by_functions(shape, impl):
    """What has no kernel of its own is differentiated as the contract."""
    x, branch, weight, bias = (t.requires_grad_() for t in arguments(shape, torch.float64, device_of(impl))[:4])
    op = partial(mf.residual_norm, impl=impl)
    assert torch.autograd.gradcheck(op, (x, branch, weight, bias))
    assert torch.autograd.gradgradcheck(op, (x, branch, weight, bias))

    def loss(x: Tensor) -> Tensor:
        return op(x, branch.detach(), weight.detach(), bias.detach())[1].square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_tensor_in_several_places(impl):
    x, _, weight, *_ = arguments((3, 4), torch.float64, device_of(impl))
    for function in (lambda t, w: (t, t, w, w), lambda t, w: (t[0], t[1], w, t[2])):
        given = [t.detach().clone().requires_grad_() for t in (x, weight)]
        found, expected = (
            torch.autograd.grad([o.square().sum() for o in op(*function(*given))], given)
            for op in (partial(mf.residual_norm, impl=impl), by_definition)
        )
        torch.testing.assert_close(found, expected)


def test_sums_do_not_depend_on_the_number_of_threads():
    given = arguments((500, 70), torch.float32, "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(outcome(mf.residual_norm, *given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_autocast_changes_nothing():
    given = arguments((4, 8), torch.float32, "cpu")[:4]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mf.residual_norm(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, mf.residual_norm(*given), strict=True))


def test_messages():
    x, w = torch.rand(4, 5), torch.rand(5)
    with pytest.raises(ValueError, match=r"weight must have shape \[5\], as the rows of x, got \[4\]"):
        mf.residual_norm(x, x, torch.rand(4), w)
    with pytest.raises(ValueError, match=r"branch must have the shape of x, \[4, 5\], got \[5\]"):
        mf.residual_norm(x, x[0], w, w)
    with pytest.raises(TypeError, match="branch must have dtype float32, got bfloat16"):
        mf.residual_norm(x, x.bfloat16(), w, w)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., D\], got \[\]"):
        mf.residual_norm(torch.tensor(1.0), torch.tensor(1.0), w, w)
    for eps in (-1e-5, math.inf):
        with pytest.raises(ValueError, match=f"eps must be a finite number, at least 0, got {eps}"):
            mf.residual_norm(x, x, w, w, eps)
