"""The least time of a step, from bytes and FLOPs alone."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import Work, work_of
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
    monkeypatch.setattr(roofline, "rates", lambda device: (1e9, {"bf16": 1e9}))
    found = roofline.measure(torch.device("cpu"), 0.1, "tiny", 4, "bf16")
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    predicted = {kind["name"]: kind for kind in roofline.kinds_of(work_of("tiny", 4, 1e9, 1e9))}
    assert {name: kind["flops"] for name, kind in kinds.items()} == {n: kind["flops"] for n, kind in predicted.items()}
    assert kinds["products"]["bytes"] == predicted["products"]["bytes"]
    times = [kind["ms"] for kind in found["kinds"]]
    assert times == sorted(times, reverse=True)
    assert 0 < kinds["products"]["ms"] < sum(times) < 20 * found["whole_ms"]
    *_, total = (line.split("|") for line in roofline.kinds_table(found["kinds"]))
    assert total[1].strip() == "all"
    assert float(total[5]) == pytest.approx(sum(times), abs=0.1)
    assert len(roofline.kinds_table(list(predicted.values()))[0].split("|")) == len(total) - 2
