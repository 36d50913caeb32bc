"""Unmodified models of four libraries against the same models with their attention maps written out."""

import pytest
import torch
import zoo
from zoo import assert_same

from maskcf_fast.explain import explain, record_attention
from maskcf_fast.explain.models import known_readout


@pytest.mark.parametrize("requires_grad", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_equals_maps_written_out(name, train, requires_grad):
    model = zoo.make(name, train=train, requires_grad=requires_grad)
    images, labels = zoo.inputs()
    cam = explain(model, images, labels)
    assert_same(cam, zoo.expected(name, model, images, labels))
    assert model.training == train
    assert all(p.grad is None and p.requires_grad == requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip-map", "hf-dinov2", "open_clip-visual"])
@pytest.mark.parametrize("start_layer", [1, 2])
def test_start_layer(name, start_layer):
    model = zoo.make(name)
    images, labels = zoo.inputs()
    truth = zoo.expected(name, model, images, labels, start_layer)
    assert_same(explain(model, images, labels, start_layer=start_layer), truth)
    assert_same(explain(model, images, labels, start_layer=start_layer - 3), truth)


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit", "hf-siglip"])
def test_predicted_class_is_explained_without_labels(name):
    model = zoo.make(name)
    images, _ = zoo.inputs()
    output = model(images)
    predicted = getattr(output, "logits", output).argmax(dim=1)
    assert len(set(predicted.tolist())) > 1
    assert torch.equal(explain(model, images), explain(model, images, predicted))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_recording_leaves_logits_and_training_alone(name):
    model = zoo.make(name)
    images, labels = zoo.inputs()

    def step(logits):
        model.zero_grad()
        torch.nn.functional.cross_entropy(getattr(logits, "logits", logits), labels).backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    plain = model(images)
    with record_attention() as record:
        recorded = model(images)
    logits = getattr(recorded, "logits", recorded)
    assert torch.equal(logits, getattr(plain, "logits", plain))
    record.relevance(logits, labels, readout=known_readout(model))
    for with_record, without in zip(step(recorded), step(plain), strict=True):
        assert (with_record is None) == (without is None)
        assert with_record is None or torch.equal(with_record, without)


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit", "hf-vit"])
def test_autocast(name):
    """Narrow activations, relevance in float32: within bfloat16's error of the float32 map."""
    model = zoo.make(name)
    images, labels = zoo.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        cam = explain(model, images, labels)
    truth = zoo.expected(name, model, images, labels)
    assert cam.dtype == torch.float32
    assert 0 < (cam - truth).norm() < 0.1 * truth.norm()


@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip-gap", "open_clip-visual"])
def test_float64(name):
    model = zoo.make(name, dtype=torch.float64)
    images, labels = zoo.inputs()
    images = images.double()
    cam = explain(model, images, labels)
    truth = zoo.expected(name, model, images, labels)
    assert cam.dtype == torch.float64
    assert (cam - truth).abs().max() <= 1e-12 * truth.abs().max()


def test_grid_follows_the_patch_embedding():
    model = zoo.timm_model("vit_tiny_patch16_224", img_size=(16, 40), reg_tokens=4)
    with record_attention() as record:
        logits = model(torch.randn(2, 3, 16, 40))
    assert record.relevance(logits, torch.tensor([0, 1])).shape == (2, 10)  # of 15 tokens
    assert record.grid == (2, 5)
