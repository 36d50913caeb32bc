"""What cannot be explained is refused, and the message names the remedy."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from test_record import IMAGES, LABELS, Toy, by_name, sdpa
from torch import nn

from maskcf_fast.explain import explain, record_attention
from maskcf_fast.models import VisionTransformer


def windowed(q, k, v):
    q, k, v = (x[:, :, 1:].unflatten(2, (4, 4)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return F.pad(sdpa(q, k, v).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2, 3), (0, 0, 1, 0))


def eager(q, k, v):
    return torch.softmax(q @ k.mT / 4, dim=-1) @ v


def sometimes_eager(q, k, v, calls=[]):  # noqa: B006
    calls.append(0)
    return eager(q, k, v) if len(calls) == 2 else sdpa(q, k, v)


def sometimes_masked(q, k, v, calls=[]):  # noqa: B006
    calls.append(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=len(calls) == 2)


class Hierarchical(Toy):
    def forward(self, images):
        x = F.pad(self.embed(images).flatten(2).mT, (0, 0, 1, 0))
        x = sdpa(x[:, None], x[:, None], x[:, None])[:, :, ::4]
        return self.head(sdpa(x, x, x)[:, 0, 0])


class PoolsSome(Toy):
    def forward(self, images):
        x = F.pad(self.embed(images).flatten(2).mT, (0, 0, 1, 0))[:, None]
        x = sdpa(x, x, x)
        return self.head(sdpa(x[:, :, :1], x[:, :, 1:], x[:, :, 1:])[:, 0, 0])


def hf_eager():
    import transformers

    config = transformers.ViTConfig(**zoo.VISION, num_labels=zoo.CLASSES)
    return transformers.ViTForImageClassification._from_config(config, attn_implementation="eager")


def timm_eager():
    model = zoo.timm_model("vit_tiny_patch16_224")
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def hidden(x):
    return by_name(attn_mask=x)


LIBRARY = torch.library.Library("maskcf_tests", "DEF")  # an op as the quantised ones are: nothing for autograd
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", lambda x: x.detach().clone(), "CPU")
opaque = torch.ops.maskcf_tests.opaque

BIAS = torch.zeros(17, 17)
BIAS[3, 4] = 0.1
REFUSED = {
    "timm without fused attention": (timm_eager, "set_fused_attn"),
    "HF eager": (hf_eager, "attn_implementation"),
    "no attention at all": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), "no attention call was recorded"),
    "one layer eager": (lambda: Toy(sometimes_eager, layers=3), "1 attention maps over the same 17 tokens"),
    "windows": (lambda: Toy(windowed), "windowed attention"),
    "causal": (lambda: Toy(by_name(is_causal=True)), "with a mask, a position bias or causally"),
    "bool mask": (lambda: Toy(hidden(torch.ones(17, 17).tril().bool())), "with a mask, a position bias"),
    "bias": (lambda: Toy(hidden(BIAS)), "with a mask, a position bias"),
    "one layer masked": (lambda: Toy(sometimes_masked), "some of the attention calls over 17 tokens run with a mask"),
    "dropout": (lambda: Toy(by_name(dropout_p=0.1)), r"dropout 0\.1.*model\.eval\(\)"),
    "cross-attention": (lambda: Toy(lambda q, k, v: sdpa(q, k[:, :, :9], v[:, :, :9])), "cross-attention"),
    "parallel blocks": (lambda: zoo.timm_model("vit_small_patch16_18x2_224"), "side by side"),
    "differential attention": (lambda: zoo.timm_model("vit_tiny_patch16_224", attn_layer="diff"), "side by side"),
    "mean without a word": (lambda: Toy(read=lambda x: x.mean(1)), r"reads 16 of 16 patches.*readout=\"mean\""),
    "pooling of some tokens": (PoolsSome, r"different lengths \[16, 17\].*attention pooling over other tokens"),
    "fewer tokens in later layers": (Hierarchical, r"different lengths \[5, 17\].*Hierarchical models"),
    "an op without derivative": (
        lambda: Toy(read=lambda x: opaque(x[:, 0])),
        "explain the model before it is quantised",
    ),
    "no logits": (lambda: lambda x: {"features": Toy()(x)}, "returns dict without logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name):
    build, message = REFUSED[name]
    model = build()
    with pytest.raises((ValueError, TypeError), match=message):
        explain(model, IMAGES, LABELS)


def test_a_score_from_attention_weights_themselves():
    with record_attention() as record:
        tokens, weights = nn.MultiheadAttention(32, 2, batch_first=True)(*[torch.randn(3, 17, 32)] * 3)
    assert record.relevance(tokens[:, 0], LABELS).shape == (3, 16)
    with pytest.raises(ValueError, match="depends on attention weights themselves"):
        record.relevance(tokens[:, 0] + weights.mean((1, 2))[:, None], LABELS)


@pytest.mark.parametrize("cut", ["no_grad", "detach"])
def test_layers_that_the_model_cuts_off(cut):
    model = zoo.make("torchvision-vit")
    layers = model.encoder.layers
    lower = layers[0].forward
    layers[0].forward = (lambda x: lower(x).detach()) if cut == "detach" else torch.no_grad()(lower)
    with pytest.raises(ValueError, match=r"1 of 3 layers are cut off from the score.*record_attention\(\) the layers"):
        explain(model, IMAGES, LABELS)
    with record_attention() as record:
        logits = model(IMAGES)
    above = zoo.expected("torchvision-vit", zoo.make("torchvision-vit"), IMAGES, LABELS, 1)
    torch.testing.assert_close(record.relevance(logits, LABELS), above, rtol=1e-4, atol=1e-5)


def test_an_image_that_is_not_finite_is_not_taken_for_another_readout():
    with pytest.raises(ValueError, match="holds NaN or infinity: look for them in the images"):
        explain(Toy(sdpa), IMAGES * float("nan"))


@pytest.mark.parametrize("build", ["timm", "own", "open_clip"])
def test_a_model_without_a_classifier_has_no_predicted_class(build):
    model = {
        "timm": lambda: zoo.timm_model("vit_tiny_patch16_224", num_classes=0),
        "own": lambda: VisionTransformer("tiny"),
        "open_clip": lambda: zoo.open_clip_model().visual,
    }[build]()
    images = torch.rand(3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"has no classifier.*pass labels"):
        explain(model, images)
    assert explain(model, images, LABELS).shape == (3, 16)


@pytest.mark.parametrize("name", ["timm", "open_clip", "given"])
def test_patches_that_were_dropped_have_no_place(name):
    if name == "open_clip":
        model = zoo.open_clip_model(patch_dropout=0.5).visual
    else:
        model = zoo.timm_model("vit_tiny_patch16_224", patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"made 4×4 patches, but the first layer sees 9 tokens.*model.eval\(\)"):
        explain(model.train(), IMAGES, LABELS, prefix_tokens=1 if name == "given" else None)
    assert explain(model.eval(), IMAGES, LABELS).shape == (3, 16)


def test_two_forward_passes_averaged():
    model = Toy()
    with pytest.raises(ValueError, match="several forward passes"):
        explain(lambda x: model(x) + model(x.flip(3)), IMAGES, LABELS)


def test_two_towers_of_other_lengths():
    model, text = Toy(), zoo.TextScores(nn.Identity(), 3).ids
    tower = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0, batch_first=True)

    def scores(x):
        return model(x) @ tower(F.one_hot(text % 5).float()).mean(1).T

    with pytest.raises(ValueError, match=r"different lengths \[7, 17\].*text encoder"):
        explain(scores, IMAGES, LABELS)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard):
    with record_attention() as record, guard():
        logits = Toy()(IMAGES)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        record.relevance(logits, LABELS)


def test_logits_from_elsewhere():
    with record_attention() as record:
        logits = Toy()(IMAGES)
    with pytest.raises(RuntimeError, match="detach"):
        record.relevance(logits.detach(), LABELS)
    with pytest.raises(ValueError, match="do not depend"):
        record.relevance(Toy()(IMAGES), LABELS)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1, 5]), ValueError, r"\[0, 4\], got 0 to 5"),
        (torch.tensor([-1, 1, 4]), ValueError, "got -1 to 4"),
        (torch.tensor([0, 1]), ValueError, r"labels must have shape \[3\]"),
        (torch.tensor([0.0, 1, 2]), TypeError, "int64"),
    ],
)
def test_labels(labels, error, message):
    with pytest.raises(error, match=message):
        explain(Toy(), IMAGES, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_layer": 3}, r"start_layer must be an int in \[-3, 2\], got 3"),
        ({"start_layer": 1.5}, r"start_layer must be an int in \[-3, 2\], got 1.5"),
        ({"start_layer": -4}, r"start_layer must be an int in \[-3, 2\], got -4"),
        ({"prefix_tokens": 17}, r"prefix_tokens must lie in \[0, 16\], got 17"),
        ({"readout": "mean"}, "reads 0 of 16 patches and 1 of 1 tokens"),
        ({"readout": "attention"}, "a last fused attention call with one query"),
        ({"readout": "cls"}, "readout must be one of class, mean"),
        ({"readout": torch.ones(16)}, r"readout must have shape \[17\]"),
        ({"prefix_tokens": 0}, r"made 4×4 patches, but the first layer sees 17 tokens, of which 0 come before"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        explain(Toy(), IMAGES, LABELS, **options)


@pytest.mark.parametrize("made", [torch.Tensor.mean, lambda x: x[:, 0], lambda x: x.argmax(1), lambda x: x[..., None]])
def test_what_a_function_returns_must_be_logits(made):
    model, message = Toy(), r"the logits that the model returns must have (shape \[N, C\]|dtype)"
    with pytest.raises((ValueError, TypeError), match=message):
        explain(lambda images: made(model(images)), IMAGES)


def test_logits_in_a_dictionary():
    model = Toy()
    assert torch.equal(explain(lambda images: {"logits": model(images)}, IMAGES), explain(model, IMAGES))
    with pytest.raises(TypeError, match="returns dict without logits"):
        explain(lambda images: {"score": model(images)}, IMAGES)


def test_one_query_in_the_last_call_must_be_explained():
    with record_attention() as record:
        logits = zoo.make("timm-siglip-map")(IMAGES)
    with pytest.raises(ValueError, match='readout="attention" if it is a learned query'):
        record.relevance(logits, LABELS)


def test_unknown_prefix():
    with record_attention() as record:
        logits = nn.TransformerEncoderLayer(32, 2, 8, 0.0, batch_first=True)(torch.randn(3, 40, 32))[:, 0]
    with pytest.raises(ValueError, match=r"which of the 40 tokens are patches"):
        record.relevance(logits, LABELS)
    assert record.relevance(logits, LABELS, prefix_tokens=4).shape == (3, 36)
    assert record.grid == (6, 6)
    with pytest.raises(ValueError, match='readout="class\\+mean" needs a class token'):
        record.relevance(logits, LABELS, prefix_tokens=0, readout="class+mean")


def test_readout_weights():
    """Explicit weights give what the names stand for."""
    model = Toy(read=lambda x: x[:, 1:].mean(1))
    weights = torch.full((17,), 1 / 16).index_fill(0, torch.tensor([0]), 0)
    named = explain(model, IMAGES, LABELS, readout="mean")
    assert torch.equal(explain(model, IMAGES, LABELS, readout=weights), named)
    both = explain(model, IMAGES, LABELS, readout="class+mean")
    assert not torch.allclose(both, named)
