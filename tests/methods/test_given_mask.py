"""Steps with a mask that is given: the same function, without the map."""

import pytest
import torch
from students import moved
from torch.utils.flop_counter import FlopCounterMode

from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.models import VisionTransformer, VisionTransformerConfig

CONFIG = VisionTransformerConfig(32, 4, 64, 4, 4, 48)
OPTIONS = {
    "object-single": {},
    "object-multi": {"cam_target": "logprob"},
    "context-none": {"cam": "gradcam"},
    "context-single": {"cam_source": "teacher"},
    "object-none": {"temperature": 3.0},
}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.rand(6, 3, 32, 32), torch.randint(10, (6,))


def make(name, **options):
    student, teacher = moved(VisionTransformer(CONFIG), classes=10)
    with_head = "temperature" in options or "cam_source" in options
    return CounterfactualDistiller(student, teacher if with_head else teacher.backbone, name, **options)


def outcome(method, batch, **options):
    """Of `backward` and of `forward`: the outputs, and every gradient."""
    draw = method.strategy.draw(6, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for two_passes in (True, False):
        method.zero_grad()
        if two_passes:
            out = method.backward(*batch, draw=draw, scale=0.5, **options)
        else:
            out = method(*batch, draw=draw, **options)
            out.loss.backward()
        results.append((out, [p.grad.clone() for p in method.student.parameters()]))
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_steps_own_mask_gives_the_same_step(name, precision, batch):
    method = make(name, **OPTIONS[name])
    method.precision = precision
    # In bf16, the two ways to step round the map otherwise, and so may cut another mask.
    for way, (expected, expected_grads) in enumerate(outcome(method, batch)):
        mask = expected.mask
        assert 0 < mask.sum() < mask.numel()
        out, grads = outcome(method, batch, mask=mask)[way]
        assert out.cam is None
        assert expected.cam is not None
        assert torch.equal(out.mask, mask)
        for field in ("loss", "task", "distill", "logits"):
            assert torch.equal(getattr(out, field), getattr(expected, field)), field
        # The map's own backward pass goes before the others and touches none of their sums.
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_select_gives_that_mask(name, precision, batch):
    method = make(name, **OPTIONS[name])
    method.precision = precision
    expected = method.backward(*batch).mask
    method.zero_grad()
    mask = method.select(*batch)
    if precision == "bf16" and method.map.target == "logprob":  # there from the mean of the task losses
        assert (mask == expected).float().mean() > 0.95
    else:
        assert torch.equal(mask, expected)
    assert all(p.grad is None for p in method.parameters())
    if precision == "fp32":  # whatever is beside them
        assert torch.equal(method.select(batch[0][2:4], batch[1][2:4]), expected[2:4])


@pytest.mark.parametrize(("source", "saved"), [("student", 1.0), ("teacher", 2.0)])
def test_cost_without_the_map(source, saved, batch):
    """One forward pass less: that of the map's backward pass, and the teacher's own before it."""
    method = make("object-single", cam_source=source) if source == "teacher" else make("object-single")
    mask = method.select(*batch)

    def flops(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    forward = flops(lambda: method.student(batch[0]))
    difference = flops(lambda: method.backward(*batch)) - flops(lambda: method.backward(*batch, mask=mask))
    assert difference == pytest.approx(saved * forward, rel=0.25)  # attention runs backward at more than 1 F


def test_no_taps_are_recorded(batch, monkeypatch):
    method = make("object-single")
    mask = method.select(*batch)
    recorded = []
    real = VisionTransformer.encode

    def spy(self, tokens, *, packing=None, record=False):
        recorded.append(record)
        return real(self, tokens, packing=packing, record=record)

    monkeypatch.setattr(VisionTransformer, "encode", spy)
    method.backward(*batch, mask=mask)
    assert recorded == [False, False, False]  # clean, teacher, masked
    method.backward(*batch)
    assert sorted(recorded[3:]) == [False, False, True]


def test_another_mask_is_taken_as_it_is(batch):
    """Not only where it agrees with the map."""
    method = make("object-single")
    mask = torch.rand(6, 64) < 0.3
    (two, two_grads), (one, one_grads) = outcome(method, batch, mask=mask)
    exact = outcome(method, batch)[1][0]
    assert torch.equal(two.mask, mask)
    assert torch.equal(one.task, exact.task)
    assert not torch.equal(one.distill, exact.distill)
    for a, b in zip(two_grads, one_grads, strict=True):
        assert (a - 0.5 * b).norm() < 1e-6 * (0.5 * b).norm()


@pytest.mark.parametrize(
    "mask", [torch.ones(6, 63, dtype=torch.bool), torch.ones(5, 64, dtype=torch.bool), torch.ones(6, 64)]
)
def test_wrong_masks_are_refused(mask, batch):
    method = make("object-single")
    for step in (method, method.backward):
        with pytest.raises((ValueError, TypeError), match="mask"):
            step(*batch, mask=mask)


def test_a_random_strategy_has_nothing_to_select_from(batch):
    with pytest.raises(ValueError, match="cam must be given"):
        make("random-single").select(*batch)
