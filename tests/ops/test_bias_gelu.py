"""bias_gelu against the definition in float64, its gradients against autograd's, and against PyTorch's own errors."""

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
ACTIVATIONS = ["gelu", "gelu_tanh", "quick_gelu"]
SHAPES = {"one": (1,), "short": (3, 5), "lanes": (4, 2, 64), "odd": (70, 131), "blocks": (2, 67, 300)}


def true_gelu(z: Tensor, activation: str) -> Tensor:
    """By the definition, differentiable, in float64."""
    if activation == "gelu":
        return z * torch.special.ndtr(z)
    if activation == "quick_gelu":
        return z / (1 + torch.exp(-1.702 * z))
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, bias and the result's gradient; some of it far out in the tails."""
    g = cases.generator(len(shape))
    x, grad = (torch.randn(shape, generator=g, dtype=torch.float64) * scale for scale in (3, 1))
    bias = torch.randn(shape[-1], generator=g, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(device, dtype), bias.to(device, wide), grad.to(device, dtype)


def outcome(function, x: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result and both gradients, in float64 on the CPU."""
    x, bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    out = function(x, bias)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    gradients = torch.autograd.grad(out, (x, bias), grad)
    assert [g.dtype for g in gradients] == [x.dtype, bias.dtype]
    return tuple(t.detach().double().cpu() for t in (out, *gradients))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("shape", "mode"), [*((s, "eager") for s in SHAPES), ("odd", "compiled")])
def test_value_and_gradients(shape, mode, dtype, activation, impl):
    """Within the dtype's rounding and a few of float32's, which the derivative makes more of far from zero."""
    x, bias, grad = arguments(SHAPES[shape], dtype, device_of(impl))
    op = mf.bias_gelu
    if mode == "compiled":
        torch.compiler.reset()
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    found = outcome(lambda x, bias: op(x, bias, activation, impl=impl), x, bias, grad)
    truth = outcome(lambda x, bias: true_gelu(x + bias, activation), x.double(), bias.double(), grad.double())
    facts = torch.finfo(dtype)
    cut = INTERPRETED and impl == "triton" and dtype == torch.bfloat16  # the interpreter cuts it off
    inner = 8 * torch.finfo(bias.dtype).eps * (1 + (x.double() + bias.double()).cpu() ** 2)
    steep = inner * grad.double().cpu().abs()
    for a, b, slack in zip(found[:2], truth[:2], (inner, steep), strict=True):
        assert ((a - b).abs() <= (1.01 if cut else 0.51) * facts.eps * (b.abs() + facts.tiny) + slack).all()
    assert ((found[2] - truth[2]).abs() <= steep.reshape(-1, len(bias)).sum(dim=0)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tails_zeros_and_what_is_no_number(activation, impl):
    x = torch.tensor([0.0, -0.0, 60.0, 1e4, -60.0, -1e4, math.inf, math.nan], device=device_of(impl))
    out = mf.bias_gelu(x, torch.zeros_like(x), activation, impl=impl).cpu()
    assert out[:4].tolist() == [0, 0, 60, 1e4]
    assert (out[4:6].abs() <= 2e-7 * x[4:6].cpu().abs()).all()
    assert out[6] == math.inf or impl == "reference"  # PyTorch's is not a number there
    assert out[7].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_layout_and_no_rows(impl):
    device = device_of(impl)
    x, bias = torch.randn(6, 40, 9, device=device).transpose(0, 2)[:, ::2], torch.randn(12, device=device)[::2]
    bias.requires_grad_()
    expected = F.gelu(x + bias.detach())
    torch.testing.assert_close(mf.bias_gelu(x, bias, impl=impl), expected, rtol=1e-5, atol=1e-6)
    mf.bias_gelu(x[:0], bias, impl=impl).sum().backward()
    assert bias.grad.tolist() == [0] * 6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_twice_differentiable_and_by_functions(shape, activation, impl):
    """What has no kernel of its own is differentiated as the contract."""
    x, bias, _ = (t.requires_grad_() for t in arguments(shape, torch.float64, device_of(impl)))
    assert torch.autograd.gradgradcheck(lambda x, b: mf.bias_gelu(x, b, activation, impl=impl), (x, bias))
    (expected,) = torch.autograd.grad(mf.bias_gelu(x, bias, activation, impl=impl).sum(), x)
    found = torch.func.grad(lambda x: mf.bias_gelu(x, bias.detach(), activation, impl=impl).sum())(x.detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_that_is_x_itself(impl):
    x, bias, _ = arguments((3, 4), torch.float64, device_of(impl))
    found, expected = (outcome(function, x, bias, x) for function in (partial(mf.bias_gelu, impl=impl), plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_sums_do_not_depend_on_the_number_of_threads():
    x, bias, grad = arguments((500, 70), torch.float32, "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(outcome(mf.bias_gelu, x, bias, grad)[2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_autocast_changes_nothing():
    x, bias, _ = arguments((4, 8), torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mf.bias_gelu(x, bias)
    assert torch.equal(found, mf.bias_gelu(x, bias))


def test_messages():
    x = torch.rand(4, 5)
    with pytest.raises(ValueError, match=r"bias must have shape \[5\], as the rows of x, got \[4\]"):
        mf.bias_gelu(x, torch.rand(4))
    with pytest.raises(ValueError, match="'quick_gelu', got 'quickgelu'; did you mean 'quick_gelu'"):
        mf.bias_gelu(x, torch.rand(5), "quickgelu")
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., D\], got \[\]"):
        mf.bias_gelu(torch.tensor(1.0), torch.rand(1))
    with pytest.raises(TypeError, match="x must have dtype float32"):
        mf.bias_gelu(x.int(), torch.rand(5))
