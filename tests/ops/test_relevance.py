import pytest
import torch

import maskcf_fast as mf
from maskcf_fast.ops import dispatch, extension
from maskcf_fast.ops.dispatch import resolve
from maskcf_fast.ops.relevance import limits


def make(n=3, h=2, t=10, d=8, tq=None, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(n, h, tq or t, d, generator=g, dtype=dtype)
    k, v = (torch.randn(n, h, t, d, generator=g, dtype=dtype) for _ in range(2))
    grad = torch.randn(n, h, tq or t, d, generator=g, dtype=dtype)
    return q, k, v, grad


def test_a_layer_equals_autograd_through_the_map():
    q, k, v, _ = make()
    attention = torch.softmax(q @ k.mT * 8**-0.5, dim=-1).requires_grad_()
    score = (attention @ v).sin().sum()
    (grad_map,) = torch.autograd.grad(score, attention)
    grad_out = (attention @ v).detach().cos()
    relevance = torch.rand(3, 10, dtype=torch.float64)
    weights = (attention * grad_map).clamp(min=0).mean(dim=1)
    expected = relevance + torch.einsum("ni,nij->nj", relevance, weights)
    torch.testing.assert_close(mf.attention_relevance(q, k, v, grad_out, relevance), expected)


@pytest.mark.parametrize("start_layer", [0, 2, -1])
@pytest.mark.parametrize(
    ("prefix", "readout"),
    [(1, "class"), (5, "class"), (0, "mean"), (1, "mean"), (0, "attention"), (1, "attention"), (1, torch.rand(10))],
)
def test_row_recurrence_equals_full_products(prefix, readout, start_layer):
    """A pool's query is no token: the row is what it takes, times the product of the layers before it."""
    layers = [tuple(x + i for x in make()) for i in range(4)]  # no two layers alike
    pool = [make(tq=1)] if readout == "attention" else []
    full = torch.eye(10, dtype=torch.float64).expand(3, 10, 10)
    for layer in layers[start_layer if start_layer >= 0 or not pool else len(layers) :]:
        full = full + weights(*layer) @ full
    if pool:
        expected = (weights(*pool[0]) @ full)[:, 0]
    else:
        mean = torch.zeros(10).index_fill(0, torch.arange(prefix, 10), 1 / (10 - prefix))
        start = readout if isinstance(readout, torch.Tensor) else {"class": torch.eye(10)[0], "mean": mean}[readout]
        expected = start.double() @ (full - torch.eye(10))
    taps, grads = [x[:3] for x in layers + pool], [x[3] for x in layers + pool]
    arguments = {"start_layer": start_layer, "prefix": prefix, "readout": readout}
    cam = mf.relevance_cam(taps, grads, **arguments)
    torch.testing.assert_close(cam, expected[:, prefix:])
    half = mf.relevance_cam([[x.half() for x in tap] for tap in taps], [g.half() for g in grads], **arguments)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), cam, rtol=2e-2, atol=1e-3)


def weights(q, k, v, grad):
    return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) * (grad @ v.mT)).clamp(min=0).mean(dim=1)


def test_one_query_equals_the_first_row_of_all():
    q, k, v, grad = make()
    all_rows = mf.attention_relevance(q, k, v, grad)
    torch.testing.assert_close(mf.attention_relevance(q[:, :, :1], k, v, grad[:, :, :1]), all_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    arguments = [x.to(dtype) for x in make()]
    out = mf.attention_relevance(*arguments)
    exact = mf.attention_relevance(*(x.double() for x in arguments))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def test_heads_that_a_gpu_has_no_shared_memory_for(monkeypatch):
    """Compute capability 8.6 gives a block 99 KiB: too little for float32 heads of more than 80."""
    monkeypatch.setattr(limits, "shared_limit", lambda device: 99 << 10)
    gpu = torch.device("cuda")
    assert limits.lacks("cuda", gpu, torch.float32, 80) is None
    assert "take 102400 bytes of shared memory per block, and the GPU has 101376" in limits.lacks(
        "cuda", gpu, torch.float32, 81
    )
    assert limits.lacks("cuda", gpu, torch.bfloat16, 128) is None
    monkeypatch.setattr(extension, "why_not", lambda part, op: None)
    assert dispatch.why_not("maskcf_fast.ops.relevance", "cuda", gpu, (torch.float32, 64)) is None
    assert resolve("maskcf_fast.ops.relevance", "auto", gpu, (torch.float32, 96)) != "cuda"


def test_scale_is_used():
    q, k, v, grad = make()
    torch.testing.assert_close(
        mf.attention_relevance(q, k, v, grad, scale=0.1), mf.attention_relevance(q * 0.1 * 8**0.5, k, v, grad)
    )
