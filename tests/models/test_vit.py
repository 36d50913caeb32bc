from dataclasses import replace

import pytest
import torch

from maskcf_fast.core.errors import UserError
from maskcf_fast.methods.fills import FILLS
from maskcf_fast.methods.paper_order import plain_forward
from maskcf_fast.models import (
    CosineClassifier,
    PoolTap,
    Rotary,
    Tap,
    VisionTransformer,
    load_backbone,
    preset,
)
from maskcf_fast.ops import pack_tokens, refill_patches

POOLED = replace(
    preset("tiny"), pool="attention", class_token=False, pre_norm=False, patch_bias=True, activation="gelu_tanh"
)


@pytest.mark.parametrize(
    ("config", "queries"),
    [(preset("tiny"), [17, 17, 17, 1]), (POOLED, [16, 16, 16, 16, 1])],
    ids=["of the last block, the class token alone", "attention pool"],
)
def test_features_and_taps(config, queries):
    model = VisionTransformer(config)
    images = torch.rand(3, 3, 32, 32)
    feature, taps = model.encode(model.embed(images), record=True)
    expected, maps = plain_forward(model, images)
    torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-6)
    assert [t.q.shape[2] for t in taps] == queries
    assert [type(t) for t in taps] == [Tap] * 4 + [PoolTap] * (len(queries) - 4)
    for tap, attention in zip(taps, maps, strict=True):
        own = torch.softmax(tap.q @ tap.k.mT * tap.q.shape[-1] ** -0.5, dim=-1)
        torch.testing.assert_close(own, attention[:, :, : own.shape[2]], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own @ tap.v, tap.o, rtol=1e-4, atol=1e-6)


def test_an_attention_pool_without_patches():
    """Attention to nothing gives nothing: what is left are the biases, and no gradient but theirs."""
    model = VisionTransformer(replace(POOLED, output_dim=None))
    torch.nn.init.normal_(model.pool.attn.out.bias)
    tokens = model.embed(torch.rand(3, 3, 32, 32))
    pool = model.pool
    torch.nn.init.normal_(pool.probe)
    x = pool.attn.out.bias
    expected = x + pool.proj(torch.nn.functional.gelu(pool.fc(pool.ln(x)), approximate="tanh"))
    left = {"attn.out.bias", "ln.weight", "ln.bias", "fc.weight", "fc.bias", "proj.weight", "proj.bias"}
    rows, packing = pack_tokens(tokens, torch.tensor([[True], [False], [True]]).expand(3, 16), prefix=0)
    everything = torch.ones(3, 16, dtype=torch.bool)
    for feature in (
        model.encode(tokens[:, :0])[0],
        model.encode(rows, packing=packing)[0][[0, 2]],  # beside an image that has patches
        FILLS["none"].encode(model, tokens, everything, None, None),
    ):
        torch.testing.assert_close(feature, expected.expand(len(feature), -1))
        model.zero_grad()
        feature.square().sum().backward(retain_graph=True)
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {f"pool.{name}" for name in left}


TURNED = {"rotary": Rotary(), "registers": 2}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {}, TURNED, {"pool": "attention"}, {"pool": "attention", "class_token": False},
        {"pool": "mean", "class_token": False, "rotary": Rotary(offset=1)}, {"pool": "mean", **TURNED},
    ],
    ids=str,
)  # fmt: skip
def test_packed_images_are_those_encoded_one_by_one(recompute, options):
    torch.manual_seed(0)
    model = VisionTransformer(preset("tiny", layer_scale=True, **options))
    model.recompute = recompute
    tokens, prefix = model.embed(torch.rand(4, 3, 32, 32)).detach().requires_grad_(), model.config.prefix
    angles = model.angles()
    mask = torch.arange(16) >= torch.tensor([3, 16, 0, 9])[:, None]  # one whole, one without a patch
    rows, packing = pack_tokens(tokens, mask, prefix=prefix)
    turns = None if angles is None else pack_tokens(angles.expand(4, -1, -1), mask, prefix=prefix)[0]
    feature = model.encode(rows, packing=packing, angles=turns)[0]
    kept = [prefix + 16 - int(m.sum()) for m in mask]
    alone = [
        model.encode(t[None, :k], angles=None if angles is None else angles[:k])[0]
        for t, k in zip(tokens, kept, strict=True)
    ]
    torch.testing.assert_close(feature, alone := torch.cat(alone), rtol=1e-5, atol=1e-6)
    inside = [p for name, p in model.named_parameters() if name.startswith(("blocks.", "pool.attn.", "pool.fc."))]
    inputs = [tokens, *inside]
    grads, wanted = (torch.autograd.grad(f.square().sum(), inputs, retain_graph=True) for f in (feature, alone))
    for grad, want in zip(grads, wanted, strict=True):  # sums of many terms: their rounding is that of the largest
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6 * max(1.0, float(want.abs().max())))


def test_a_refilled_patch_keeps_its_place():
    """Rotary positions follow from where a patch lies: refilled tokens are the refilled image's, and a shift is not."""
    torch.manual_seed(0)
    model, images = VisionTransformer(preset("tiny", positions="none", **TURNED)), torch.rand(2, 3, 32, 32)
    mask, donors = torch.rand(2, 16) < 0.5, torch.tensor([1, 0])
    pixels = model(refill_patches(images, mask, donors))
    torch.testing.assert_close(FILLS["single"].encode(model, model.embed(images), mask, donors, None), pixels)
    assert not torch.allclose(model(images.roll(8, 3)), model(images), atol=1e-3)


def test_uint8_and_float_pixels_agree():
    model = VisionTransformer("tiny")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(model(pixels), model(pixels.permute(0, 3, 1, 2).float() / 255))


@pytest.mark.parametrize(
    ("change", "span"),
    [(lambda x: (x - 0.45) / 0.27, "-1.6"), (lambda x: 255 * x, "0"), (lambda x: x * torch.nan, "nan")],
    ids=["normalised already", "0 to 255", "NaN"],
)
def test_float_images_outside_their_range(change, span):
    pixels = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match=rf"float images must lie in \[0, 1\], got {span}.*before normalisation"):
        VisionTransformer("tiny")(change(pixels))
    VisionTransformer("tiny")(pixels * 1.3 - 0.15)  # what bicubic resizing leaves
    VisionTransformer(preset("tiny", mean=(0.0,) * 3, std=(1.0,) * 3))(change(pixels).nan_to_num())


@pytest.mark.parametrize("frozen", ["embedding", "everything"])
def test_every_tap_of_a_frozen_model_has_a_gradient(frozen):
    model, images = VisionTransformer("tiny"), torch.rand(2, 3, 32, 32)

    def gradients():
        feature, taps = model.encode(model.embed(images), record=True)
        return torch.autograd.grad(feature.sum(), [tap.o for tap in taps])

    expected = gradients()
    for name, p in model.named_parameters():
        p.requires_grad_(frozen == "embedding" and name.startswith(("blocks.3", "ln_post")))
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    assert not model(images).requires_grad or frozen == "embedding"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ViT-B/32", 87_849_216),
        ("ViT-B/16", 86_192_640),
        ("ViT-L/14", 303_966_208),
        ("ViT-L/14@336", 304_293_888),
        ("SigLIP-B/16", 92_884_224),
    ],
)
def test_presets_are_the_published_vision_towers(name, parameters):
    with torch.device("meta"):
        model = VisionTransformer(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VisionTransformer(None), TypeError, "a VisionTransformerConfig or the name of a preset, got None"),
        (lambda: load_backbone(VisionTransformer("tiny"), 3), TypeError, "a file's path or a state dict, got int"),
        (lambda: CosineClassifier("5", 3), TypeError, "sizes must be ints, got '5' features, 3 classes"),
        (lambda: VisionTransformer("ViT-B/23"), ValueError, r"unknown model preset 'ViT-B/23'.*mean 'ViT-B/32'"),
        (lambda: preset("tiny", image_size=30), ValueError, "=30 does not divide by patch_size=8: take 24 or 32"),
        (lambda: preset("tiny", width=97), ValueError, "width=97 does not divide into heads=4"),
        (lambda: preset("tiny", mlp_width=0), ValueError, "mlp_width must be at least 1, got 0"),
        (lambda: preset("tiny", pool="map"), ValueError, "pool must be 'class' or 'mean' or 'attention', got 'map'"),
        (lambda: preset("tiny", activation="relu"), ValueError, "'gelu' or 'gelu_tanh' or 'silu', got 'relu'"),
        (lambda: preset("tiny", eps=0.0), ValueError, "eps must be positive, got 0"),
        (lambda: setattr(VisionTransformer("tiny"), "recompute", "GELU"), ValueError, "False, True or 'gelu', got"),
        (
            lambda: VisionTransformer("tiny")(torch.rand(1, 3, 40, 40)),
            ValueError,
            r"images must have shape \[N, 3, 32, 32\], got \[1, 3, 40, 40\]",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


class OfParts(torch.nn.Linear):
    """Its backward pass needs parts of what came in, transposed."""

    def forward(self, x):
        return (self.weight @ (x[:, 1:].mT * x[:, :-1].mT)).mT + self.bias


@pytest.mark.parametrize("kind", [torch.nn.Linear, OfParts])
def test_gelu_is_made_again_as_it_was(kind):
    """Also for derivatives of derivatives, and in backward passes one after another."""
    torch.manual_seed(0)
    model = VisionTransformer("tiny").double()
    block, x = model.blocks[0], torch.randn(2, 96, 96, dtype=torch.float64, requires_grad=True)
    block.proj = kind(384, 96).double()
    inputs, found = [x, block.fc.weight, block.fc.bias, block.proj.weight], []
    for what in (False, "gelu"):
        model.recompute = what
        loss = block.mlp(x).square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, retain_graph=True)
        found.append([*first, *second, *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("recompute", ["gelu", True])
def test_functions_derivatives_say_that_nothing_is_made_again_there(recompute):
    model, images = VisionTransformer("tiny"), torch.rand(2, 3, 32, 32)

    def loss(weight):
        return torch.func.functional_call(model, {"patch_weight": weight}, images).square().sum()

    weight = model.patch_weight.detach().clone()
    (expected,) = torch.autograd.grad(model(images).square().sum(), model.patch_weight)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    model.recompute = recompute
    with pytest.raises(UserError, match=rf"recompute={recompute!r} cannot be had here: set model\.recompute"):
        torch.func.grad(loss)(weight)


def test_gelu_is_not_made_again_of_other_values():
    model = VisionTransformer("tiny")
    model.recompute = "gelu"
    block = model.blocks[0]
    out = block.mlp(torch.randn(2, 5, 96))
    with torch.no_grad():
        block.fc.bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), block.proj.weight)


def test_cosine_head_ignores_the_features_length():
    embeddings = torch.randn(5, 64)
    head = CosineClassifier.from_text(embeddings, scale=100.0)
    features = torch.randn(3, 64)
    logits = head(features)
    torch.testing.assert_close(logits, 100 * torch.cosine_similarity(features[:, None], embeddings, dim=-1))
    torch.testing.assert_close(head(features * 7), logits)
