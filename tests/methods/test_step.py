"""The fast step is the same function as the paper's order."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from students import moved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.core.errors import UserError
from maskcf_fast.methods import (
    CounterfactualDistiller,
    FeatureDistillation,
    FineTuning,
    KnowledgeDistillation,
    MaskStrategy,
    paper_order_step,
    strategy_names,
)
from maskcf_fast.methods.fills import REGIONS
from maskcf_fast.methods.label_map import LabelMap
from maskcf_fast.methods.losses import task_loss
from maskcf_fast.methods.paper_order import paper_cam
from maskcf_fast.models import CosineClassifier, ImageClassifier, Rotary, VisionTransformer, VisionTransformerConfig

PLAIN = VisionTransformerConfig(32, 4, 64, 3, 4, None, "gelu", pre_norm=False, patch_bias=True)
SIZES = {
    "8×8 patches": VisionTransformerConfig(32, 4, 64, 4, 4, 48),
    "7×7 patches": VisionTransformerConfig(56, 8, 96, 3, 6, None, "gelu"),
    "one block": VisionTransformerConfig(24, 8, 32, 1, 2, 32),
    "attention pool": replace(
        PLAIN, activation="gelu_tanh", mlp_width=100, eps=1e-6, pool="attention", class_token=False
    ),
    "attention pool over a class token, rotary positions": replace(
        PLAIN, rotary=Rotary(offset=1, columns_first=True), pool="attention", pool_heads=2, pool_mlp_width=60
    ),
    "registers, rotary positions alone, gates": replace(
        PLAIN, registers=3, positions="none", rotary=Rotary(100, "centred", halves=True), gated_mlp=True,
        activation="silu", layer_scale=True, qkv_bias="qv",
    ),
    "norms within, a projection's bias": replace(
        PLAIN, rotary=Rotary(grid=16), qk_norm=True, attention_norm=True, mlp_norm=True, output_dim=48,
        projection_bias=True,
    ),
    "mean": replace(PLAIN, pool="mean", class_token=False, qkv_bias="none"),
    "norm of a mean, registers": replace(PLAIN, registers=2, positions="patches", pool="mean", pool_norm=True),
}  # fmt: skip


def make(config, seed=0, batch=6, classes=10):
    """A student that has moved away from its teacher, and a batch."""
    student, teacher = moved(VisionTransformer(config), classes, seed)
    with torch.no_grad():
        student.head.weight.mul_(10)
    images = torch.rand(batch, 3, config.image_size, config.image_size)
    return student, teacher.backbone, images, torch.randint(classes, (batch,))


def gradients(loss, student):
    student.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}


def relative(a, b):
    return float((a - b).norm() / b.norm())


def linear_flops(counter):
    """Of matrix products but those of attention."""
    return sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", strategy_names())
def test_equals_the_paper_order(name, size, seed):
    student, teacher, images, labels = make(SIZES[size], seed)
    strategy = MaskStrategy.from_name(name)
    check_against_paper(student, teacher, images, labels, strategy, seed)


@pytest.mark.parametrize("region", ["object", "context"])
@pytest.mark.parametrize("fill", ["single", "multi", "none"])
def test_top_k_equals_the_paper_order(region, fill):
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    check_against_paper(student, teacher, images, labels, MaskStrategy(region, fill, top_k=20), seed=0)


@pytest.mark.parametrize("name", strategy_names())
def test_two_passes_are_the_same_sums(name):
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    method = CounterfactualDistiller(student, teacher, name)
    draw = method.strategy.draw(6, 64)
    one = method(images, labels, draw=draw)
    expected = gradients(0.25 * one.loss, student)
    student.zero_grad()
    two = method.backward(images, labels, draw=draw, scale=0.25)
    for field, value in one._asdict().items():
        got = getattr(two, field)
        assert got is value is None or torch.equal(got, value), field
        assert got is None or not got.requires_grad
    for name, p in student.named_parameters():
        assert relative(p.grad, expected[name]) < 1e-6, name


FROZEN = {
    "embedding and head": lambda name: "blocks" not in name and "ln_post" not in name,
    "backbone": lambda name: name.startswith("backbone."),
    "all but the last block": lambda name: "blocks.3" not in name,
}


@pytest.mark.parametrize("part", FROZEN)
@pytest.mark.parametrize("step", ["one graph", "two passes"])
def test_frozen_parts_change_no_other_gradient(part, step):
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    method = CounterfactualDistiller(student, teacher, "object-single")
    draw = method.strategy.draw(6, 64)
    expected = gradients(method(images, labels, draw=draw).loss, student)
    student.zero_grad()
    frozen = [name for name in expected if FROZEN[part](name)]
    for name in frozen:
        student.get_parameter(name).requires_grad_(False)
    if step == "one graph":
        method(images, labels, draw=draw).loss.backward()
    else:
        method.backward(images, labels, draw=draw)
    for name, p in student.named_parameters():
        # torch 2.11 rounds the product of the last block's one query otherwise where its weights rest.
        assert p.grad is None if name in frozen else relative(p.grad, expected[name]) < 3e-6, name


def test_two_passes_take_less_memory():
    """Bytes that autograd keeps for later, at their highest."""
    student, teacher, images, labels = make(VisionTransformerConfig(32, 4, 64, 8, 4, 48))
    method = CounterfactualDistiller(student, teacher, "random-single")
    with KeptBytes() as one:
        method(images, labels).loss.backward()
    with KeptBytes() as two:
        method.backward(images, labels)
    assert two.peak < 0.6 * one.peak


class KeptBytes:
    """Counts the bytes of distinct storages that graphs hold."""

    def __enter__(self):
        self.held, self.peak = {}, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        return Kept(self, tensor.detach(), storage.data_ptr(), storage.nbytes())


class Kept:
    def __init__(self, counter, tensor, key, size):
        self.counter, self.tensor, self.key = counter, tensor, key
        uses, _ = counter.held.get(key, (0, size))
        counter.held[key] = (uses + 1, size)
        counter.peak = max(counter.peak, sum(size for _, size in counter.held.values()))

    def __del__(self):
        uses, size = self.counter.held.pop(self.key)
        if uses > 1:
            self.counter.held[self.key] = (uses - 1, size)


def test_images_of_which_nothing_is_left():
    """A context mask of an empty map leaves out all patches."""
    student, teacher, images, labels = make(SIZES["attention pool"])
    mask = torch.rand(6, 64) < 0.5
    mask[:2] = True
    strategy = MaskStrategy.from_name("context-none")
    draw = strategy.draw(6, 64)
    fast = CounterfactualDistiller(student, teacher, strategy).backward(images, labels, draw=draw, mask=mask)
    grads = {name: p.grad.clone() for name, p in student.named_parameters()}
    filling = strategy.filling
    given = SimpleNamespace(needs_cam=False, region="context", mask=lambda cam, draw: mask, filling=filling)
    paper = paper_order_step(student, teacher, given, images, labels, draw)
    torch.testing.assert_close(fast.loss, paper.loss.detach(), rtol=1e-5, atol=0)
    for name, grad in gradients(paper.loss, student).items():
        assert relative(grads[name], grad) < 1e-5, name


@pytest.mark.parametrize("size", ["8×8 patches", "attention pool"])
@pytest.mark.parametrize("target", ["logit", "logprob"])
@pytest.mark.parametrize("kind", ["relevance", "gradcam"])
def test_maps_against_their_definition(kind, target, size):
    """Computed with the attention maps at hand, and alike in one pass and in two."""
    student, teacher, images, labels = make(SIZES[size])
    if kind == "relevance":
        head = student.head if target == "logit" else lambda feature: student.head(feature).log_softmax(dim=1)
        expected = paper_cam(SimpleNamespace(transformer=student.backbone, head=head), images, labels)
    else:
        last = student.backbone.pool or student.backbone.blocks[-1]
        seen = []
        hook = last.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        logits = student(images)
        hook.remove()
        scores = logits if target == "logit" else torch.log_softmax(logits, dim=1)
        (grad,) = torch.autograd.grad(scores[range(6), labels].sum(), seen)
        expected = torch.einsum("nc,nlc->nl", grad.sum(dim=1), seen[0])[:, -64:].clamp(min=0)
    assert expected.max() > 0
    method = CounterfactualDistiller(student, teacher, "object-single", cam=kind, cam_target=target)
    one = method(images, labels, generator=torch.Generator().manual_seed(0))
    two = method.backward(images, labels, scale=0.5, generator=torch.Generator().manual_seed(0))
    assert relative(one.cam, expected) < 1e-5
    assert relative(two.cam, expected) < 1e-5
    assert torch.equal(one.mask, two.mask)


def test_logprob_map_costs_no_backward_pass():
    student, teacher, images, labels = make(SIZES["8×8 patches"], batch=8)
    flops = {}
    for target, name in (("logit", "object-single"), ("logprob", "object-single"), ("logit", "random-single")):
        method = CounterfactualDistiller(student, teacher, name, cam_target=target)
        with FlopCounterMode(display=False) as counter:
            method.backward(images, labels, draw=method.strategy.draw(8, 64))
        flops[target, name] = linear_flops(counter)
    assert flops["logprob", "object-single"] == flops["logit", "random-single"] < flops["logit", "object-single"]


@pytest.mark.parametrize("size", ["8×8 patches", "attention pool"])
@pytest.mark.parametrize(("what", "share"), [(True, 0.5), ("gelu", 0.9)])
def test_recomputed_activations_give_the_same_gradients(what, share, size):
    student, teacher, images, labels = make(SIZES[size])
    method = CounterfactualDistiller(student, teacher, "object-single")
    draw = method.strategy.draw(6, 64)
    results = []
    for recompute in (False, what):
        student.backbone.recompute = recompute
        student.zero_grad()
        with KeptBytes() as kept:
            out = method.backward(images, labels, draw=draw)
        results.append((out, [p.grad.clone() for p in student.parameters()], kept.peak))
    (plain, plain_grads, plain_peak), (again, again_grads, again_peak) = results
    assert torch.equal(plain.cam, again.cam)
    assert torch.equal(plain.loss, again.loss)
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, again_grads, strict=True))
    assert again_peak < share * plain_peak


@pytest.mark.parametrize("size", ["8×8 patches", "attention pool"])
def test_bfloat16_is_close_and_keeps_float32_where_it_matters(size):
    student, teacher, images, labels = make(SIZES[size])
    method = CounterfactualDistiller(student, teacher, "random-single")
    draw = method.strategy.draw(6, 64)
    exact = method(images, labels, draw=draw)
    expected = gradients(exact.loss, student)
    method.precision = "bf16"
    student.zero_grad()
    out = method.backward(images, labels, draw=draw)
    assert out.loss.dtype == out.logits.dtype == torch.float32
    assert 0 < abs(out.task - exact.task) < 0.02 * exact.task
    assert 0 < abs(out.distill - exact.distill) < 0.02 * exact.distill
    for name, p in student.named_parameters():
        assert p.grad.dtype == torch.float32
        # The pool's gradients of all patches cancel almost, in the bias of the LayerNorm before it.
        assert relative(p.grad, expected[name]) < (0.15 if name == "backbone.ln_post.bias" else 0.1), name
    with torch.autocast("cpu", torch.bfloat16):
        feature, taps = student.backbone.encode(student.backbone.embed(images), record=True)
    assert {t.dtype for t in (feature, *taps[0], *taps[-1])} == {torch.bfloat16}


class Casts(TorchDispatchMode):
    """How often a weight of this shape was cast to bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        self.count += cast and args[0].shape == self.shape
        return func(*args, **kwargs)


def test_a_step_in_bfloat16_casts_a_weight_once_and_its_narrow_teachers_never():
    found = []
    for keep, narrow in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        student, teacher, images, labels = make(SIZES["8×8 patches"])
        method = CounterfactualDistiller(student, teacher, "object-single")
        method.precision, method.keep_casts = "bf16", keep
        if narrow:
            method.narrow_teacher()
        blocks = student.backbone.blocks
        with Casts(blocks[0].fc.weight.shape) as casts:
            method.backward(images, labels, generator=torch.Generator().manual_seed(0))
        assert not torch.is_autocast_enabled("cpu")
        assert casts.count == len(blocks) * ((1 if keep else 2) + (0 if narrow else 1))
        found.append([p.grad for p in student.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_autocast_of_the_caller_counts_where_the_method_has_no_precision_of_its_own():
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    method = CounterfactualDistiller(student, teacher, "object-single")
    with torch.autocast("cpu", torch.bfloat16), Casts(student.backbone.blocks[0].fc.weight.shape) as casts:
        method.backward(images, labels, generator=torch.Generator().manual_seed(0))
    assert casts.count


@pytest.mark.parametrize("kind", ["relevance", "gradcam"])
def test_maps_and_losses_are_float32_under_autocast(kind):
    student, _, images, _ = make(SIZES["8×8 patches"])
    label_map = LabelMap(kind, "logit", 0, SIZES["8×8 patches"])
    with torch.autocast("cpu", torch.bfloat16):
        _, taps = student.backbone.encode(student.backbone.embed(images), record=True)
        grads = [torch.randn_like(x) for x in label_map.read(taps)]
        got = label_map.from_gradients(taps, grads)
    wide = [type(tap)(*(x.float() for x in tap)) for tap in taps]
    assert relative(got, label_map.from_gradients(wide, [g.float() for g in grads])) < 1e-5

    logits = torch.randn(6, 10).to(torch.bfloat16)
    exact = torch.nn.functional.cross_entropy(logits.float(), torch.arange(6))
    assert torch.equal(task_loss(logits, torch.arange(6)), exact)


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


def test_a_teacher_may_normalise_otherwise():
    student, teacher, images, labels = make(SIZES["8×8 patches"])
    other = VisionTransformer(replace(teacher.config, mean=(0.1, 0.2, 0.3)))
    other.load_state_dict(teacher.state_dict())
    strategy = MaskStrategy.from_name("object-single")
    check_against_paper(student, other, images, labels, strategy, seed=0)
    assert not CounterfactualDistiller(student, other, strategy).same_rows


@pytest.mark.parametrize("size", ["8×8 patches", "attention pool"])
def test_start_layer_is_passed_on(size):
    student, teacher, images, labels = make(SIZES[size])
    method = CounterfactualDistiller(student, teacher, "object-single", start_layer=-1)
    feature, taps = student.backbone.encode(student.backbone.embed(images), record=True)
    last = taps[student.backbone.config.depth - 1 :]  # and the pool
    expected = LabelMap("relevance", "logit", 0, SIZES[size])(student.head(feature), labels, last)
    assert torch.equal(method(images, labels).cam, expected)
    with pytest.raises(ValueError, match=r"start_layer must lie in \[-[34], [23]\], got 4"):
        CounterfactualDistiller(student, teacher, "object-single", start_layer=4)


def test_the_map_costs_no_weight_gradient():
    """Its backward pass costs as much as the forward one, attention aside, not twice as much."""
    student, _, images, labels = make(SIZES["8×8 patches"])
    with FlopCounterMode(display=False) as forward:
        feature, taps = student.backbone.encode(student.backbone.embed(images), record=True)
        logits = student.head(feature)
    with FlopCounterMode(display=False) as backward:
        LabelMap("relevance", "logit", 0, SIZES["8×8 patches"])(logits, labels, taps)
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


@pytest.mark.parametrize("size", ["8×8 patches", "attention pool"])
@pytest.mark.parametrize("name", strategy_names())
def test_a_step_reads_nothing_back_from_the_device(name, size):
    """On the "meta" device, whose tensors hold no values, whatever would wait for a GPU raises."""
    student, teacher, images, labels = make(SIZES[size])
    method = CounterfactualDistiller(student, teacher, name).to("meta")
    images, labels = images.to("meta"), labels.to("meta")

    def step():
        method.backward(images, labels)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)

    if name in ("object-none", "context-none"):  # by threshold, the number of kept patches is in the mask
        with pytest.raises(RuntimeError, match="meta"):
            step()
        method.strategy = MaskStrategy(name.split("-")[0], "none", top_k=20)
    step()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("fill", ["single", "multi", "none"])
def test_draws_follow_the_strategy(region, fill):
    strategy = MaskStrategy.from_name(f"{region}-{fill}")
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
    fd = FeatureDistillation(student, teacher, weight=3.0)(images, labels)
    torch.testing.assert_close(fd.loss, ce + 3 * ((feature - teacher(images)) ** 2).mean())

    frozen = ImageClassifier(copy.deepcopy(teacher), copy.deepcopy(student.head))
    kd = KnowledgeDistillation(student, frozen, weight=2.0, temperature=10.0)(images, labels)
    p, log_q = (frozen(images) / 10).softmax(-1), (logits / 10).log_softmax(-1)
    expected = 100 * (p * (p.log() - log_q)).sum(dim=-1).mean()
    torch.testing.assert_close(kd.loss, ce + 2 * expected, rtol=1e-4, atol=0)
    (fd.loss + kd.loss).backward()
    assert all(p.grad is None for p in [*teacher.parameters(), *frozen.parameters()])

    student.zero_grad()
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


@pytest.mark.parametrize("options", [{"rate": 1.0}, {"top_k": 16}])
def test_leaving_out_every_patch_is_refused(options):
    """Without other tokens there is nothing at all to take a feature from; with some, nothing of the image."""
    student = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 5))
    strategy = MaskStrategy.from_name("random-none" if "rate" in options else "object-none", **options)
    with pytest.raises(UserError, match=r"leaves none of the 16 patches.*mask fewer"):
        CounterfactualDistiller(student, VisionTransformer("tiny"), strategy)
