"""The least time of a step, from bytes and FLOPs alone."""

import pytest
import torch

from benchmarks.roofline import Work, measured, rows_of, work_of
from maskcf_fast.models import preset
from maskcf_fast.training.cost import step_cost


def test_an_operation_counts_what_it_reads_and_writes_and_a_view_nothing():
    a, b = torch.zeros(6, 10), torch.zeros(10, 4)
    with Work(bandwidth=1e3, matrix=1e3) as work:
        product = a @ b
        product.t()[:, 1:].unsqueeze(0)
        product.add_(torch.zeros(6, 4))
    assert work.bytes["products"] == 4 * (60 + 40 + 24)
    assert work.flops["products"] == 2 * 6 * 10 * 4
    assert work.bytes["the rest"] == 4 * 3 * 24
    assert work.seconds["products"] == pytest.approx(max(496 / 1e3, 480 / 1e3))
    assert set(work.bytes) == {"products", "the rest"}


def test_the_optimiser_reads_and_writes_weights_gradients_and_moments():
    p = torch.zeros(8, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([p], fused=True)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        with Work(1.0, 1.0) as work:
            optimizer.step()
    assert 7 * 96 <= work.bytes["clip and AdamW"] < 9 * 96  # and the count of steps


def test_a_step_has_the_arithmetic_that_info_tells():
    config = preset("tiny")
    found = work_of("tiny", 4, 1e12, 1e12)
    assert sum(found.flops.values()) == step_cost(config, 4, precision="bf16").flops
    assert {"products", "attention", "relevance", "GELU", "sums and LayerNorm", "clip and AdamW"} <= found.bytes.keys()


def test_what_is_measured_is_the_same_work_with_its_time(monkeypatch):
    monkeypatch.setattr("benchmarks.roofline.rates", lambda device: (1e9, {"bf16": 1e9}))
    found, whole = measured(preset("tiny"), 4, torch.device("cpu"), 0.1)
    predicted = work_of("tiny", 4, 1e9, 1e9)
    assert found.flops == predicted.flops
    assert found.bytes["products"] == predicted.bytes["products"]
    assert 0 < found.taken["products"] < sum(found.taken.values()) < 20 * whole
    *_, total = rows_of(found)
    assert total[0] == "all"
    assert float(total[5]) == pytest.approx(1e3 * sum(found.taken.values()), abs=0.1)
    assert len(rows_of(predicted)[0]) == len(total) - 2
