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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"k": a["k"][:, :1]}, ValueError, r"k must have shape \[3, 2, T, 8\]"),
        (lambda a: a | {"v": a["v"][:, :, :4]}, ValueError, r"v must have shape \[3, 2, 10, 8\]"),
        (lambda a: a | {"v": a["v"].float()}, TypeError, "v must have dtype float64, got float32"),
        (lambda a: a | {"q": a["q"][:, :, :3], "grad_out": a["grad_out"][:, :, :3]}, ValueError, "got Tq=3"),
        (lambda a: a | {"grad_out": a["grad_out"][:, :, :3]}, ValueError, "grad_out must have shape"),
        (lambda a: a | {"relevance": torch.ones(3, 9)}, ValueError, r"relevance must have shape \[3, 10\]"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = change(dict(zip(("q", "k", "v", "grad_out"), make(), strict=True)))
    with pytest.raises(error, match=message):
        mf.attention_relevance(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"taps": [], "grads": []}, ValueError, "got 0 and 0"),
        ({"taps": [make()[:3]] * 2}, ValueError, "got 2 and 1"),
        ({"taps": [make()[:2]]}, ValueError, "taps must hold q, k and v of each layer, got 2 tensors in layer 0"),
        ({"start_layer": 1}, ValueError, "start_layer must lie between -1 and 0, got 1"),
        ({"start_layer": "0"}, TypeError, "start_layer must be an int, got '0'"),
        ({"prefix": 10}, ValueError, "prefix must lie between 0 and T - 1=9, got 10"),
        ({"prefix": 0}, ValueError, 'readout="class" needs a class token, but prefix=0: all tokens are patches'),
        ({"readout": "map"}, ValueError, "readout must be 'class', 'mean', 'attention' or weights, got 'map'"),
        ({"readout": torch.ones(9)}, ValueError, r"readout must have shape \[10\], got \[9\]"),
        ({"readout": "attention"}, ValueError, "an attention pool has one query, got Tq=10"),
    ],
)
def test_bad_layers(arguments, error, message):
    with pytest.raises(error, match=message):
        mf.relevance_cam(**({"taps": [make()[:3]], "grads": [make()[3]]} | arguments))
