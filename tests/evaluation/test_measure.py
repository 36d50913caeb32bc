"""Counting, against plain loops over the same outputs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from coloured import SIZE, ByColour, write_objectnet, write_tree

from maskcf_fast.core.processes import Processes
from maskcf_fast.core.schema import conform
from maskcf_fast.data import LoaderConfig, LoadingError, Manifest, build_loader
from maskcf_fast.evaluation import Reader, Results, Spec, Suite, measure, read_benchmark, suite
from maskcf_fast.evaluation.benchmark import Benchmark
from maskcf_fast.evaluation.measure import Accumulator, Measurement
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer

ALONE = Processes(0, 1, torch.device("cpu"))


def benchmark_of(labels, targets, allowed):
    names = tuple(f"class {i}" for i in range(len(targets)))
    paths = tuple(map(str, range(len(labels))))
    return Benchmark("x", "folder", Manifest("/", names, paths, tuple(labels)), targets, allowed)


def naive(logits, labels, targets, allowed):
    """Top-1, top-5 and calibration error, image by image."""
    right, among, rows = 0, 0, []
    for scores, label in zip(logits, labels, strict=True):
        choices = [c for c in range(len(scores)) if allowed[c]]
        weights = np.exp(scores[choices] - max(scores[choices]))
        order = sorted(choices, key=lambda c: -scores[c])
        hit = bool(targets[label][order[0]])
        right += hit
        among += any(targets[label][c] for c in order[:5])
        rows.append((max(weights) / sum(weights), hit))
    error = 0.0
    for k in range(15):
        inside = [(c, hit) for c, hit in rows if k / 15 < c <= (k + 1) / 15]
        if inside:
            error += abs(sum(hit for _, hit in inside) - sum(c for c, _ in inside))
    n = len(labels)
    return 100 * right / n, 100 * among / n, 100 * error / n


@pytest.mark.parametrize("restricted", [False, True])
def test_counts_are_those_of_a_loop(restricted):
    rng = np.random.default_rng(0)
    n, outputs = 400, 12
    labels = rng.integers(0, 4, n)
    targets = np.zeros((4, outputs), dtype=bool)
    for label, columns in enumerate([(0,), (3, 7), (5,), (2, 8, 11)]):  # several right outputs
        targets[label, list(columns)] = True
    allowed = np.ones(outputs, dtype=bool)
    if restricted:
        allowed[[1, 4, 9]] = False
    logits = rng.normal(0, 2, (n, outputs))
    logits[np.arange(n), [np.flatnonzero(targets[label])[0] for label in labels]] += 1.5
    benchmark = benchmark_of(labels.tolist(), torch.tensor(targets), torch.tensor(allowed))
    metrics = Accumulator(benchmark, ALONE.device)
    for at in range(0, n, 64):
        metrics.add(torch.tensor(logits[at : at + 64]), torch.tensor(labels[at : at + 64]))
    result = metrics.result(ALONE)
    top1, top5, error = naive(logits, labels, targets, allowed)
    assert (result.top1, result.top5) == (top1, top5)
    assert result.ece == pytest.approx(error, abs=1e-5)
    assert result.images == n
    assert {name: seen for name, (seen, _) in result.per_class.items()} == {
        f"class {label}": int((labels == label).sum()) for label in range(4)
    }
    assert sum(right for _, right in result.per_class.values()) == round(top1 * n / 100)
    assert result.low < result.top1 < result.high


def test_certain_and_even_predictions_are_binned():
    """Confidence 1 belongs to the last bin; 1/2 of two outputs, all wrong, is an error of one half."""
    both = torch.ones(2, dtype=torch.bool)
    metrics = Accumulator(benchmark_of([0, 0], torch.tensor([[True, False]]), both), ALONE.device)
    metrics.add(torch.tensor([[200.0, 0.0], [200.0, 0.0]]), torch.tensor([0, 0]))
    result = metrics.result(ALONE)
    assert (result.top1, result.ece, result.top5) == (100, 0, None)
    metrics = Accumulator(benchmark_of([1, 1], torch.tensor([[True, False], [False, False]]), both), ALONE.device)
    metrics.add(torch.zeros(2, 2), torch.tensor([1, 1]))
    assert metrics.result(ALONE).ece == pytest.approx(50, abs=1e-12)


@pytest.mark.parametrize(("choices", "top5"), [(5, None), (6, 0.0)])
def test_top5_of_five_choices_says_nothing(choices, top5):
    allowed = torch.arange(8) < choices
    metrics = Accumulator(benchmark_of([0], torch.arange(8)[None] == choices - 1, allowed), ALONE.device)
    metrics.add(torch.arange(8.0, 0.0, -1.0)[None], torch.tensor([0]))  # the right output is the last of the choices
    assert metrics.result(ALONE).top5 == top5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_an_error(bad):
    metrics = Accumulator(
        benchmark_of([0], torch.tensor([[True, False]]), torch.ones(2, dtype=torch.bool)), ALONE.device
    )
    metrics.add(torch.tensor([[0.0, bad], [0.0, 1.0]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="NaN or infinite for 1 of 2 images"):
        metrics.result(ALONE)


def test_top1_is_the_share_of_right_answers(image_folders):
    torch.manual_seed(1)
    model = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3)).train()
    benchmark = read_benchmark(Spec.parse(f"folder:{image_folders['train']}"), Reader(("cat", "dog", "owl")))
    config = LoaderConfig(batch_size=7, image_size=model.backbone.config.image_size, train=False, threads=0)
    loader = build_loader(benchmark.source, config, "torch")
    result = measure(model, benchmark, loader, ALONE)
    assert model.training
    with torch.no_grad():
        hits = [(model.eval()(images).argmax(1) == labels).sum() for images, labels, _ in loader]
    assert result.top1 == 100 * int(sum(hits)) / len(benchmark)
    assert conform(json.loads(json.dumps(dataclasses.asdict(result))), Measurement, "here") == result


def test_processes_share_the_images(tmp_path):
    root = write_tree(tmp_path / "x", {"a": [0, 0, 1], "b": [1, 1], "c": [2, 0]})
    benchmark = read_benchmark(Spec.parse(f"folder:{root}"), Reader(("a", "b", "c")))
    tallies = []
    for rank in range(3):
        config = LoaderConfig(2, SIZE, train=False, threads=0, rank=rank, world_size=3)
        metrics = Accumulator(benchmark, ALONE.device)
        for images, labels, indices in build_loader(benchmark.source, config, "torch"):
            metrics.add(ByColour(3)(images), labels)
            assert labels.tolist() == [benchmark.source.labels[i] for i in indices]
        tallies.append(metrics)
    seen = [int(t.by_class[0].sum()) for t in tallies]
    assert (sum(seen), max(seen) - min(seen)) == (7, 1)
    for name in ("by_class", "by_bin", "overall", "confidence"):
        setattr(tallies[0], name, sum(getattr(t, name) for t in tallies))
    config = LoaderConfig(4, SIZE, train=False, threads=0)
    assert tallies[0].result(ALONE) == measure(
        ByColour(3), benchmark, build_loader(benchmark.source, config, "torch"), ALONE
    )


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_images_smaller_than_their_border(tmp_path, backend):
    root = write_tree(tmp_path / "x", {"a": [0]})
    benchmark = read_benchmark(Spec.parse(f"folder:{root}"), Reader(("a",)))
    with pytest.raises(LoadingError, match=r"a/0\.png: its sides \(16, 16\) leave nothing inside a border of 8"):
        list(build_loader(benchmark.source, LoaderConfig(1, SIZE, train=False, threads=0, border=8), backend))


def test_a_suite_cuts_the_border_and_tells_decoders_apart(wnids, tmp_path, monkeypatch):
    """The stub sees ObjectNet's red frame, class 31, where it is not cut off; DALI's pixels are not PIL's."""
    monkeypatch.setattr(suite, "_backbones", lambda model: [model.backbone])
    specs = [Spec.parse(f"objectnet:{write_objectnet(tmp_path / 'objectnet')}")]
    specs += [Spec.parse(f"imagenet:{write_tree(tmp_path / 'val', {wnids[0]: [0, 0]})}")]
    for backend in ("torch", "dali", "torch"):
        if backend == "dali":
            pytest.importorskip("nvidia.dali")
        results = Results(tmp_path / "results.json", "evaluate")
        made = Suite(specs, Reader(wnids), results, ALONE, batch_size=4, threads=1, backend=backend)
        found = made.measure(ByColour(1000), "fp32", "stub")
        assert found["objectnet"].per_class == {"alarm_clock": (4, 2), "backpack": (1, 1), "drill": (1, 1)}
        keys = [key.rsplit("-", 1)[1].split()[0] for key in results._saved]
        assert keys == ["PIL", "PIL", *(["DALI", "DALI"] if "DALI" in keys else [])]
        assert backend == "torch" or len(keys) == 4
