"""What is recorded, when, and what is refused, on a transformer small enough to be bent in every way."""

import contextlib
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from zoo import assert_same

import maskcf_fast as mf
from maskcf_fast.explain import explain, record_attention

sdpa = F.scaled_dot_product_attention


class Toy(nn.Module):
    """Class token, 4 × 4 patches; ``attend(q, k, v)`` is the attention, ``read(tokens)`` the read-out."""

    def __init__(self, attend=sdpa, read=lambda x: x[:, 0], kv_heads=4, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.read, self.kv_heads = attend, read, kv_heads
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.qkv = nn.ModuleList(nn.Linear(32, 8 * (4 + 2 * kv_heads)) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.head = nn.Linear(32, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(3)

    def forward(self, images):
        x = self.embed(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            y = qkv(F.layer_norm(x, (32,))).unflatten(-1, (-1, 8)).transpose(1, 2)
            q, k, v = y.split([4, self.kv_heads, self.kv_heads], dim=1)
            x = x + out(self.attend(q, k, v).transpose(1, 2).flatten(2)).tanh()
        return self.head(self.read(x))


def oracle(model, images, labels):
    """`zoo.expected` for a `Toy` that calls the function by its name in torch."""
    logits, maps = zoo.sdpa_maps(model, images)
    grads = torch.autograd.grad(logits[range(len(labels)), labels].sum(), maps)
    r = torch.eye(maps[0].shape[-1])
    for p, g in zip(maps, grads, strict=True):
        r = r + (p * g).clamp(min=0).mean(1) @ r
    return r[:, 0, 1:]


def by_name(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


IMAGES, LABELS = zoo.inputs()
VISIBLE = {"bool": torch.ones(17, 17, dtype=torch.bool), "float": torch.zeros(17, 17)}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"scale": 0.7}, {"attn_mask": VISIBLE["bool"]}, {"attn_mask": VISIBLE["float"]}, {"dropout_p": 0.0}],
    ids=["scale", "all-visible bool mask", "all-visible float mask", "no dropout"],
)
def test_arguments_of_the_call(options, requires_grad):
    model = Toy(by_name(**options)).requires_grad_(requires_grad)
    cam = explain(model, IMAGES, LABELS)
    assert_same(cam, oracle(model.requires_grad_(True), IMAGES, LABELS))


def test_grouped_queries():
    model = Toy(by_name(enable_gqa=True), kv_heads=2)
    cam = explain(model, IMAGES, LABELS)
    model.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]])
    assert_same(cam, oracle(model, IMAGES, LABELS))


def test_mixed_dtypes_under_autocast():
    """Autocast narrows the inputs inside the call, as does the record."""
    with torch.autocast("cpu", torch.bfloat16):
        cam = explain(Toy(lambda q, k, v: F.scaled_dot_product_attention(q.float(), k.float(), v)), IMAGES, LABELS)
        assert torch.equal(cam, explain(Toy(), IMAGES, LABELS))


def test_relevance_is_not_narrowed_by_autocast():
    with record_attention() as record:
        logits = Toy()(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = record.relevance(logits, LABELS)
    assert torch.equal(narrow, record.relevance(logits, LABELS))


def test_a_function_imported_earlier_is_seen_and_nothing_is_patched():
    model = Toy(sdpa)
    with record_attention() as record:
        assert F.scaled_dot_product_attention is sdpa
        logits = model(IMAGES)
    assert_same(record.relevance(logits, LABELS), oracle(Toy(by_name()), IMAGES, LABELS))


class Multihead(nn.Module):
    """One layer by torch's module, which is asked for its weights unless told otherwise."""

    def __init__(self, asked):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.options = {} if asked else {"need_weights": False}

    def forward(self, x):
        out, self.weights = self.attention(x, x, x, **self.options)
        return out[:, 0]


def test_multihead_attention_that_is_asked_for_its_weights():
    x = torch.randn(3, 17, 32)
    asked, fused = Multihead(True), Multihead(False)
    with record_attention() as record:
        logits, wanted = asked(x), fused(x)
    assert_same(record.relevance(logits, LABELS), record.relevance(wanted, LABELS))
    recorded = asked.weights
    torch.testing.assert_close(asked(x), logits)
    assert torch.equal(asked.weights, recorded)
    assert fused.weights is None


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_transformer_encoder_with_its_fast_path(train, requires_grad):
    layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(train).requires_grad_(requires_grad)
    with record_attention() as record:
        logits = encoder(torch.randn(3, 17, 32))[:, 0]
    assert len(record.calls) == 2
    assert record.relevance(logits, LABELS).shape == (3, 16)


def test_inside_after_and_repeated(monkeypatch):
    """Also where relevance itself is computed by functions that the context would see."""
    original = mf.attention_relevance
    monkeypatch.setattr(
        sys.modules["maskcf_fast.ops.relevance"],
        "attention_relevance",
        lambda *layer, scale, impl: original(*layer, scale=scale, impl="reference"),
    )
    model = Toy()
    with record_attention() as record:
        logits = model(IMAGES)
        inside = record.relevance(logits, LABELS)
        again = record.relevance(logits, LABELS)
    assert len(record.calls) == 3
    after = record.relevance(logits, LABELS)
    assert torch.equal(inside, again)
    assert torch.equal(inside, after)


def test_every_forward_pass_has_its_own_map():
    model = Toy()
    with record_attention() as record:
        first, second = model(IMAGES), model(IMAGES.flip(0))
        with torch.no_grad():
            model(IMAGES)
    assert_same(record.relevance(second, LABELS), explain(model, IMAGES.flip(0), LABELS))
    assert_same(record.relevance(first, LABELS), explain(model, IMAGES, LABELS))


def fail_inside(model):
    with contextlib.suppress(KeyError), record_attention() as record:
        model(IMAGES)
        raise KeyError
    return record


def test_nested_contexts_and_exceptions():
    model = Toy()
    with record_attention() as outer:
        failed = fail_inside(model)
        with record_attention() as inner:
            logits = zoo.make("torchvision-vit")(IMAGES)
    assert (len(outer.calls), len(failed.calls), len(inner.calls)) == (6, 3, 3)
    assert torch.equal(outer.relevance(logits, LABELS), inner.relevance(logits, LABELS))
    model(IMAGES)
    assert len(outer.calls) == 6


def test_outer_function_modes():
    model = zoo.make("torchvision-vit")
    with torch.device("cpu"), record_attention() as record, torch.device("cpu"):
        logits = model(IMAGES)
    assert_same(record.relevance(logits, LABELS), zoo.expected("torchvision-vit", model, IMAGES, LABELS))


def test_other_threads_are_not_recorded():
    with record_attention() as record:
        thread = threading.Thread(target=lambda: Toy()(IMAGES))
        thread.start()
        thread.join()
    assert not record.calls


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit"])
def test_compiled_model_runs_uncompiled(name):
    model = zoo.make(name)
    truth = zoo.expected(name, model, IMAGES, LABELS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(explain(compiled, IMAGES, LABELS), truth)
    with torch.no_grad():
        compiled(IMAGES)
    assert_same(explain(compiled, IMAGES, LABELS), truth)


def test_activation_checkpointing():
    def checkpointed(q, k, v):
        return torch.utils.checkpoint.checkpoint(sdpa, q, k, v, use_reentrant=False)

    with record_attention() as record:
        cam = record.relevance(Toy(checkpointed)(IMAGES), LABELS)
        assert len(record.calls) == 3  # what the backward pass computes again is no new call
    assert_same(cam, explain(Toy(), IMAGES, LABELS))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("labels", [True, False])
def test_explain_works_inside_evaluation_code(guard, labels):
    model = Toy()
    with guard():
        cam = explain(model, IMAGES.clone(), LABELS.clone() if labels else None)  # made inside
        assert torch.equal(cam, explain(model, IMAGES, LABELS if labels else None))
    assert torch.equal(cam, explain(model, IMAGES, LABELS if labels else None))
    assert not cam.is_inference()


def test_several_inputs_by_name():
    model = Toy()
    named = {"pixel_values": IMAGES, "gain": torch.ones(())}
    cam = explain(lambda pixel_values, gain: model(pixel_values * gain), named, LABELS)
    assert torch.equal(cam, explain(model, IMAGES, LABELS))


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_lower_layers_count(frozen):
    model = Toy(by_name())
    for part in (model.embed, *model.qkv[:frozen], *model.out[:frozen]):
        part.requires_grad_(False)
    model.token.requires_grad_(False)
    cam = explain(model, IMAGES, LABELS)
    assert_same(cam, oracle(model.requires_grad_(True), IMAGES, LABELS))
