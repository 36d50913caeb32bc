"""Every implementation on generated shapes, dtypes, strides and values, against the truths of cases.py."""

from __future__ import annotations

import math
import os

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_implementations import IMPLS, INTERPRETED, poisoned, relevance_error, run, same_bits  # noqa: F401
from torch import Tensor

import maskcf_fast as mf

# The same examples at every run. An interpreted kernel takes a tenth of a second where a compiled one takes none.
generated = settings(
    derandomize=True,
    deadline=None,
    max_examples=int(os.environ.get("MASKCF_TEST_EXAMPLES", 15 if INTERPRETED else 60)),
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,  # `poisoned` is for all examples alike
    ],
    database=None,
)
FLOATS = st.sampled_from(cases.FLOATS)
FILLS = st.sampled_from(["single", "multi", "repeated", "self"])
# Values that a copy must keep and arithmetic must not lose.
SPECIAL = st.sampled_from([0.0, -0.0, 1e-40, -1.5, 3.0e4, math.inf, -math.inf, math.nan])


def tensor(draw, shape, dtype) -> Tensor:
    """Random values, some of them special ones."""
    values = torch.randn(shape, generator=cases.generator(draw(st.integers(0, 99))))
    if dtype == torch.uint8:
        return (values.abs() * 100).clamp(max=255).to(dtype)
    flat = values.flatten()
    for value in draw(st.lists(SPECIAL, max_size=4)):
        flat[draw(st.integers(0, flat.numel() - 1))] = value
    return flat.view(shape).to(dtype)


def laid_out(draw, x: Tensor) -> Tensor:
    """The same values in other strides: dense, behind an offset, a window, every other one, permuted, or repeated."""
    kind = draw(st.sampled_from(["dense", "offset", "window", "step", "permuted", "expanded"]))
    dim = draw(st.integers(0, x.ndim - 1))
    if kind == "offset":
        shift = draw(st.integers(1, 9))
        storage = torch.zeros(x.numel() + shift, dtype=x.dtype)
        return storage[shift:].view(x.shape).copy_(x)
    if kind == "window":
        return torch.cat([x, x, x], dim=dim).narrow(dim, x.shape[dim], x.shape[dim])
    if kind == "step":
        return x.repeat_interleave(2, dim=dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    if kind == "permuted":
        order = draw(st.permutations(range(x.ndim)))
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
    if kind == "expanded":
        return x.narrow(dim, 0, 1).expand(x.shape)
    return x


def cut(draw, num_patches: int) -> dict:
    """A selection."""
    region = draw(st.sampled_from(["object", "context"]))
    if draw(st.booleans()):
        return {"region": region, "top_k": draw(st.integers(0, num_patches))}
    return {"region": region, "threshold": draw(st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0, math.inf]))}


@st.composite
def refills(draw):
    """Images of any dtype and layout, with a mask and donors."""
    n, c = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    patch = draw(st.tuples(st.integers(1, 17), st.integers(1, 17)))
    shape = (n, c, grid[0] * patch[0], grid[1] * patch[1])
    images = tensor(draw, shape, draw(st.sampled_from(cases.PIXELS)))
    if draw(st.booleans()):
        images = images.contiguous(memory_format=torch.channels_last)
    num_patches = grid[0] * grid[1]
    return {
        "images": laid_out(draw, images),
        "mask": cases.random_mask(n, num_patches, draw(st.sampled_from([0.0, 0.3, 1.0]))),
        "donors": cases.random_donors(n, num_patches, draw(FILLS)),
        "grid": grid,
    }


@pytest.mark.parametrize("impl", IMPLS)
@generated
@given(data=st.data())
def test_select(impl, data):
    n, num_patches = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 300))
    cam = laid_out(data.draw, tensor(data.draw, (n, num_patches), data.draw(FLOATS)))
    selection = cut(data.draw, num_patches)
    assert torch.equal(
        run(mf.select_patches, impl, "eager", {"cam": cam} | selection), cases.true_mask(cam, **selection)
    )


@pytest.mark.parametrize("impl", IMPLS)
@generated
@given(data=st.data())
def test_refill(impl, data):
    arguments = data.draw(refills())
    out = run(mf.refill_patches, impl, "eager", arguments)
    assert same_bits(out, cases.true_refill(**arguments))


@pytest.mark.parametrize("impl", IMPLS)
@generated
@given(data=st.data())
def test_select_and_refill(impl, data):
    arguments = data.draw(refills())
    n, num_patches = arguments.pop("mask").shape
    cam = tensor(data.draw, (n, num_patches), data.draw(FLOATS))
    selection = cut(data.draw, num_patches)
    out, mask = run(mf.counterfactual_refill, impl, "eager", arguments | selection | {"cam": cam})
    expected = cases.true_mask(cam, **selection)
    assert torch.equal(mask, expected)
    assert same_bits(out, cases.true_refill(mask=expected, **arguments))


@pytest.mark.parametrize("impl", IMPLS)
@generated
@given(data=st.data())
def test_patchify(impl, data):
    draw = data.draw
    n, c, patch = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 17))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    source, fill = draw(st.sampled_from(cases.PIXELS)), draw(st.one_of(st.none(), FILLS))
    arguments = cases.patchify_case(n, grid, patch, source, draw(FLOATS), c, fill)()
    arguments["images"] = laid_out(draw, arguments["images"])
    out, expected = run(mf.patchify, impl, "eager", arguments), cases.true_patchify(**arguments)
    assert out.dtype == expected.dtype
    if impl in ("reference", "cpu"):
        assert same_bits(out, expected)
    else:  # see test_implementations.py
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("impl", IMPLS)
@generated
@given(data=st.data())
def test_gather(impl, data):
    draw = data.draw
    n, num_patches, dim = draw(st.integers(1, 6)), draw(st.integers(1, 20)), draw(st.integers(1, 70))
    dtype, prefix = draw(FLOATS), draw(st.integers(0, 5))
    tokens = laid_out(draw, tensor(draw, (n, prefix + num_patches, dim), dtype)).detach().requires_grad_()
    chosen = {
        "mask": cases.random_mask(n, num_patches, draw(st.sampled_from([0.0, 0.5, 1.0]))),
        "donors": cases.random_donors(n, num_patches, draw(FILLS)),
        "prefix": prefix,
    }
    out = run(mf.gather_tokens, impl, "eager", {"tokens": tokens} | chosen)
    assert same_bits(out.detach(), cases.true_gather(tokens.detach(), **chosen))
    grad_out = laid_out(draw, torch.randn(out.shape, generator=cases.generator(3)).to(dtype))
    (grad,) = torch.autograd.grad(out, tokens, grad_out)
    exact = cases.true_gather_grad(grad_out, **chosen)
    ulp = torch.finfo(dtype).eps * (1 if impl != "reference" else n)
    assert (grad.double() - exact).abs().max() <= 2 * ulp * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("impl", IMPLS[1:])
@generated
@given(data=st.data())
def test_relevance(impl, data):
    draw = data.draw
    n, h, t, d = (draw(st.integers(1, high)) for high in (3, 4, 40 if INTERPRETED else 150, 128))
    dtype = draw(st.sampled_from(cases.FLOATS[:3]))
    tq = draw(st.sampled_from([None, 1]))
    spread, scale = draw(st.sampled_from([0.1, 1.0, 30.0])), draw(st.sampled_from([None, 0.3, -0.2]))
    arguments = cases.relevance_case(n, h, t, d, tq, dtype, spread, draw(st.booleans()), scale)()
    arguments |= {name: laid_out(draw, arguments[name]) for name in ("q", "k", "v", "grad_out")}
    out = run(mf.attention_relevance, impl, "eager", arguments)
    torchs = relevance_error(mf.attention_relevance(**arguments, impl="reference"), arguments)
    # Of a few numbers, torch may happen to have rounded all the right way: a logit that is rounded once, to float32,
    # moves its exponential by as much as this.
    logit = (arguments["q"].double() @ arguments["k"].double().mT).abs().max() * abs(arguments["scale"] or d**-0.5)
    assert relevance_error(out, arguments) <= max(2 * torchs, torch.finfo(torch.float32).eps * max(4, float(logit)))
