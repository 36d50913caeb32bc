"""The methods beside the counterfactual one, their options, and models made by averaging."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import after_dying
from students import moved

from maskcf_fast.methods import (
    L2SP,
    CounterfactualDistiller,
    MaskStrategy,
    OutputEnsemble,
    average,
    interpolate,
    model_stock,
)
from maskcf_fast.methods.trajectory import RunningAverage
from maskcf_fast.ops import refill_patches
from maskcf_fast.training.runs import read_run
from maskcf_fast.training.trainer import Trainer

WEIGHT = 3.0


@pytest.fixture
def pair():
    """A student that has moved away from its teacher, and images with labels."""
    return *moved(), torch.rand(4, 3, 32, 32), torch.tensor([0, 3, 1, 4])


def test_l2sp_pulls_every_weight_to_its_start(pair):
    student, _, images, labels = pair
    method = L2SP(student, WEIGHT)
    start = [p.detach().clone() for p in student.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn_like(p))
    out = method.backward(images, labels)
    apart = [p.detach() - q for p, q in zip(student.parameters(), start, strict=True)]
    torch.testing.assert_close(out.distill, 0.5 * sum((d**2).sum() for d in apart), rtol=1e-5, atol=0)
    task = torch.autograd.grad(F.cross_entropy(student(images), labels), list(student.parameters()))
    for p, g, d in zip(student.parameters(), task, apart, strict=True):
        torch.testing.assert_close(p.grad, g + WEIGHT * d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("two_passes", [False, True])
def test_knowledge_distillation_on_counterfactual_images(pair, two_passes):
    student, teacher, images, labels = pair
    method = CounterfactualDistiller(student, teacher, "object-single", WEIGHT, temperature=10.0)
    draw = method.strategy.draw(4, student.backbone.config.num_patches, generator=torch.Generator().manual_seed(1))
    step = method(images, labels, draw=draw)
    refilled = refill_patches(images, step.mask, draw.donors)
    p = (teacher(refilled) / 10).softmax(dim=1).detach()
    q = (student(refilled) / 10).softmax(dim=1)
    expected = 100 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(step.distill, expected.detach(), rtol=1e-3, atol=1e-5)
    if two_passes:
        method.backward(images, labels, draw=draw)
    else:
        step.loss.backward()
    loss = F.cross_entropy(student(images), labels) + WEIGHT * expected
    for p, g in zip(student.parameters(), torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=2e-5)


def test_the_teachers_map_is_the_one_it_makes_as_a_student(pair):
    student, teacher, images, labels = pair
    own = CounterfactualDistiller(copy.deepcopy(teacher), copy.deepcopy(teacher).backbone, "object-single")
    draw = own.strategy.draw(4, student.backbone.config.num_patches, generator=torch.Generator().manual_seed(1))
    expected = own(images, labels, draw=draw)
    method = CounterfactualDistiller(student, teacher, "object-single", cam_source="teacher")
    for step in (method(images, labels, draw=draw), method.backward(images, labels, draw=draw)):
        torch.testing.assert_close(step.cam, expected.cam, rtol=1e-4, atol=1e-7)
        assert torch.equal(step.mask, expected.mask)
    assert all(p.grad is None for p in teacher.parameters())


def test_logits_of_a_teacher_without_a_head_are_refused(pair):
    student, teacher, _, _ = pair
    for options in ({"cam_source": "teacher"}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match="give it a head"):
            CounterfactualDistiller(student, teacher.backbone, "object-single", **options)
    with pytest.raises(ValueError, match="cam_source must be"):
        CounterfactualDistiller(student, teacher, "object-single", cam_source="pupil")


def test_running_averages(pair):
    """Against sums over the whole trajectory, with the density of Beta(1/2, 1/2) from SciPy."""
    student, teacher, _, _ = pair
    steps, start, seen = 6, teacher.state_dict(), []
    averages = {weights: copy.deepcopy(teacher) for weights in (0.9, "beta")}
    running = [RunningAverage(target, student, weights, steps) for weights, target in averages.items()]
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * torch.randn_like(p))
        seen.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
        for one in running:
            one.update(step)
    at = (np.arange(steps + 1) + 0.5) / (steps + 1)
    density = 1 / (np.pi * np.sqrt(at * (1 - at)))  # Beta(1/2, 1/2)'s
    expected = {0.9: [0.9**steps, *(0.1 * 0.9 ** (steps - t) for t in range(1, steps + 1))], "beta": density}
    for weights, target in averages.items():
        share = np.array(expected[weights]) / sum(expected[weights])
        for name, tensor in target.state_dict().items():
            mean = sum(float(w) * state[name] for w, state in zip(share, [start, *seen], strict=True))
            torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)


def test_other_donors_are_permutations_without_a_fixed_point():
    strategy, generator = MaskStrategy.from_name("object-single", exclude_self=True), torch.Generator().manual_seed(0)
    counts = torch.zeros(5, 5)
    for _ in range(2000):
        donors = strategy.draw(5, 4, generator=generator).donors
        assert sorted(donors.tolist()) == list(range(5))
        counts[torch.arange(5), donors] += 1
    assert counts.diagonal().eq(0).all()
    off = counts[~torch.eye(5, dtype=torch.bool)]
    assert (off - 500).abs().max() < 100  # five standard deviations
    with pytest.raises(ValueError, match="at least 2 images"):
        strategy.draw(1, 4)


def test_averages(pair):
    student, teacher, images, _ = pair
    a, b = teacher.state_dict(), student.state_dict()
    for name, tensor in interpolate(a, b, 0.25).items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name])
    for name, tensor in average([a, b]).items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    both = OutputEnsemble([teacher, student])(images)
    expected = (teacher(images).softmax(dim=1) + student(images).softmax(dim=1)) / 2
    torch.testing.assert_close(both.exp(), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"differ in head\.bias"):
        average([a, {name: t for name, t in a.items() if name != "head.bias"}])


def test_what_a_batch_norm_has_counted_stays_in_all_averages():
    few, many = ({"w": torch.full((2, 2), float(n)), "num_batches_tracked": torch.tensor(n)} for n in (4, 6))
    for merged in interpolate(few, many, 0.25), average([few, many]), model_stock(few, [many, many]):
        assert torch.equal(merged["num_batches_tracked"], few["num_batches_tracked"])
    running = torch.nn.BatchNorm2d(2)
    RunningAverage(running, torch.nn.BatchNorm2d(2), 0.9, total_steps=3).update(1)
    assert running.num_batches_tracked == 0


@pytest.mark.parametrize("k", [2, 5])
def test_model_stock_is_nearest_to_the_centre(k):
    """Of models around a centre, in directions square to each other: the foot of the centre on the line to the mean."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, k + 1, dtype=torch.float64))[0].T
    origin, centre = torch.randn(40, dtype=torch.float64), 2.0 * axes[0]
    around = [origin + centre + 3.0 * axis for axis in axes[1:]]
    still = torch.randn(3)
    states = [{"a": point.view(5, 8), "still": still, "apart": (-1) ** i * still} for i, point in enumerate(around)]
    merged = model_stock({"a": origin.view(5, 8), "still": still, "apart": torch.zeros(3)}, states)
    mean = torch.stack(around).mean(dim=0) - origin
    foot = (centre @ mean) / (mean @ mean) * mean
    torch.testing.assert_close(merged["a"], (origin + foot).view(5, 8), rtol=1e-10, atol=1e-10)
    assert torch.equal(merged["still"], still)
    assert torch.equal(merged["apart"], torch.zeros(3))  # they disagree: as it was
    with pytest.raises(ValueError, match="at least two fine-tuned models, got 1"):
        model_stock(states[0], states[:1])


@pytest.mark.parametrize("decay", [0.9, "beta"])
def test_averages_of_the_run_are_resumed_exactly(change, tmp_path, decay):
    """The moving teacher, and the average of the student, which is what is measured and saved."""
    config = change(method={"ema_teacher": decay}, optim={"ema_student": decay})
    whole = Trainer(config, quiet=True)
    first = copy.deepcopy(whole.method.teacher.state_dict())
    expected = whole.run()
    resumed = after_dying(config, tmp_path / "parts", step=5)
    assert resumed.run() == expected
    for kind in ("teacher", "average", "student"):
        end, again = (getattr(trainer.method, kind).state_dict() for trainer in (whole, resumed))
        assert all(torch.equal(end[name], again[name]) for name in end)
        assert kind != "teacher" or any(not torch.equal(first[name], end[name]) for name in end)
    saved = read_run(tmp_path / "parts", "final").tuned().state_dict()
    for kept, name in ((whole.method.average, True), (whole.method.student, False)):
        assert all(torch.equal(saved[key], x) for key, x in kept.state_dict().items()) == name
