"""The fast step is the same function as the paper's order."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.distill import (
    PAPER_CUTS,
    CounterfactualDistiller,
    FeatureDistillation,
    FineTuning,
    KnowledgeDistillation,
    MaskStrategy,
    paper_order_step,
)
from maskcf_fast.distill.counterfactual import label_relevance
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer, VisionTransformerConfig

SIZES = {
    "8×8 patches": VisionTransformerConfig(32, 4, 64, 4, 4, 48),
    "7×7 patches": VisionTransformerConfig(56, 8, 96, 3, 6, None, "gelu"),
    "one block": VisionTransformerConfig(24, 8, 32, 1, 2, 32),
}


def make(config, seed=0, batch=6, classes=10):
    """A student that has moved away from its teacher, and a batch."""
    torch.manual_seed(seed)
    student = ImageClassifier(VisionTransformer(config), CosineClassifier(config.feature_dim, classes))
    teacher = copy.deepcopy(student.backbone)
    with torch.no_grad():
        student.head.weight.mul_(10)
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    images = torch.rand(batch, 3, config.image_size, config.image_size)
    return student, teacher, images, torch.randint(classes, (batch,))


def gradients(loss, student):
    student.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PAPER_CUTS)
def test_equals_the_paper_order(name, size, seed):
    student, teacher, images, labels = make(SIZES[size], seed)
    strategy = MaskStrategy.from_name(name)
    check_against_paper(student, teacher, images, labels, strategy, seed)


@pytest.mark.parametrize("region", ["object", "context"])
@pytest.mark.parametrize("fill", ["single", "multi", "none"])
def test_top_k_equals_the_paper_order(region, fill):
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    check_against_paper(student, teacher, images, labels, MaskStrategy(region, fill, top_k=20), seed=0)


def check_against_paper(student, teacher, images, labels, strategy, seed):
    draw = strategy.draw(
        len(images), student.backbone.config.num_patches, generator=torch.Generator().manual_seed(seed)
    )
    fast = CounterfactualDistiller(student, teacher, strategy)(images, labels, draw=draw)
    fast_grads = gradients(fast.loss, student)
    paper = paper_order_step(student, teacher, strategy, images, labels, draw)
    paper_grads = gradients(paper.loss, student)

    assert torch.equal(fast.mask, paper.mask)
    assert fast.mask.any(), "nothing was masked: the comparison says nothing about masking"
    if strategy.needs_cam:
        assert relative(fast.cam, paper.cam) < 1e-5
    for field in ("loss", "task", "distill"):
        torch.testing.assert_close(getattr(fast, field), getattr(paper, field), rtol=1e-5, atol=0)
    assert paper.distill > 0
    for name, grad in paper_grads.items():
        assert grad.norm() > 0, name
        assert relative(fast_grads[name], grad) < 1e-5, name


def test_uint8_images_are_the_same_images():
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    pixels = (images * 255).round().to(torch.uint8)
    method = CounterfactualDistiller(student, teacher, "object-single")
    draw = method.strategy.draw(len(images), 64)
    a = method(pixels.permute(0, 2, 3, 1).contiguous(), labels, draw=draw)
    b = method(pixels.float() / 255, labels, draw=draw)
    assert torch.equal(a.loss, b.loss)


def test_start_layer_is_passed_on():
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    method = CounterfactualDistiller(student, teacher, "object-single", start_layer=-1)
    feature, taps = student.backbone.encode(student.backbone.embed(images))
    expected = label_relevance(student.head(feature), labels, taps[-1:])
    assert torch.equal(method(images, labels).cam, expected)
    with pytest.raises(ValueError, match=r"start_layer must lie in \[-4, 3\], got 4"):
        CounterfactualDistiller(student, teacher, "object-single", start_layer=4)


def test_the_map_costs_no_weight_gradient():
    """Its backward pass costs as much as the forward one, attention aside, not twice as much."""
    student, _, images, labels = make(SIZES["8×8 patches"])
    with FlopCounterMode(display=False) as forward:
        feature, taps = student.backbone.encode(student.backbone.embed(images))
        logits = student.head(feature)
    with FlopCounterMode(display=False) as backward:
        label_relevance(logits, labels, taps)

    def linear_flops(counter):
        names = (torch.ops.aten.mm, torch.ops.aten.addmm)
        return sum(counter.get_flop_counts()["Global"].get(name, 0) for name in names)

    assert 0 < linear_flops(backward) <= linear_flops(forward)
    assert all(p.grad is None for p in student.parameters())


def test_step_costs_what_the_arithmetic_says():
    student, teacher, images, labels = make(SIZES["8×8 patches"], batch=8)
    flops = {}
    for name in ("object-single", "random-single"):
        method = CounterfactualDistiller(student, teacher, name)
        draw = method.strategy.draw(8, 64)
        with FlopCounterMode(display=False) as counter:
            method(images, labels, draw=draw).loss.backward()
        flops[name] = counter.get_total_flops()
    strategy = MaskStrategy.from_name("object-single")
    with FlopCounterMode(display=False) as counter:
        paper_order_step(student, teacher, strategy, images, labels, strategy.draw(8, 64)).loss.backward()
    assert flops["object-single"] <= 1.2 * flops["random-single"]
    assert counter.get_total_flops() >= 1.2 * flops["object-single"]


def test_generator_decides_the_draw():
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    method = CounterfactualDistiller(student, teacher, "random-multi")
    first, again, other = (
        method(images, labels, generator=torch.Generator().manual_seed(seed)).distill for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", PAPER_CUTS)
def test_draws_follow_the_strategy(name):
    strategy = MaskStrategy.from_name(name)
    draw = strategy.draw(400, 49, generator=torch.Generator().manual_seed(0))
    shape = {"single": (400,), "multi": (400, 49), "none": None}[strategy.fill]
    assert (None if draw.donors is None else tuple(draw.donors.shape)) == shape
    if strategy.region != "random":
        assert draw.mask is None
    elif strategy.fill == "none":
        assert (draw.mask.sum(dim=1) == 49 - int(49 * 0.25)).all()
        assert draw.mask.any(dim=0).all()
    else:
        assert abs(draw.mask.float().mean() - 0.5) < 0.02  # 5 standard deviations


def test_neighbouring_methods():
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    feature, logits = student.features(images), student(images)
    ce = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.equal(FineTuning(student)(images, labels).loss, ce)

    fd = FeatureDistillation(student, teacher, weight=3.0)(images, labels)
    expected = ((feature - teacher(images)) ** 2).mean()
    torch.testing.assert_close(fd.loss, ce + 3 * expected)

    frozen = ImageClassifier(copy.deepcopy(teacher), copy.deepcopy(student.head))
    kd = KnowledgeDistillation(student, frozen, weight=2.0, temperature=10.0)(images, labels)
    p, log_q = (frozen(images) / 10).softmax(-1), (logits / 10).log_softmax(-1)
    expected = 100 * (p * (p.log() - log_q)).sum(dim=-1).mean()
    torch.testing.assert_close(kd.loss, ce + 2 * expected, rtol=1e-4, atol=0)
    assert all(p.grad is None for p in [*teacher.parameters(), *frozen.parameters()])

    probe = FineTuning(student, probe=True)
    probe(images, labels).loss.backward()
    assert [name for name, p in student.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]


def test_bad_arguments():
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    with pytest.raises(ValueError, match=r"unknown strategy 'objct-single'.*did you mean 'object-single'"):
        CounterfactualDistiller(student, teacher, "objct-single")
    with pytest.raises(ValueError, match="share parameters"):
        CounterfactualDistiller(student, student.backbone, "object-single")
    with pytest.raises(ValueError, match="differ in num_patches: 64 and 49"):
        CounterfactualDistiller(student, make(SIZES["7×7 patches"])[1], "object-single")
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        CounterfactualDistiller(student, teacher, "object-single", weight=-1)
    with pytest.raises(ValueError, match="at least 2 images in the batch, got 1"):
        CounterfactualDistiller(student, teacher, "object-multi")(images[:1], labels[:1])
    with pytest.raises(ValueError, match="labels must lie between 0 and 9, got 0 to 10"):
        CounterfactualDistiller(student, teacher, "object-single")(images, torch.tensor([0, 1, 2, 3, 4, 10]))
    with pytest.raises(RuntimeError, match="needs gradients"), torch.no_grad():
        CounterfactualDistiller(student, teacher, "object-single")(images, labels)
    with pytest.raises(ValueError, match="exactly one of threshold and top_k"):
        MaskStrategy.from_name("object-single", threshold=0.3, top_k=5)
    with pytest.raises(ValueError, match=r"rate must lie between 0 and 1, got 1.5"):
        MaskStrategy.from_name("random-none", rate=1.5)
