"""Measuring a stub on a data set."""

import pytest
import torch
from coloured import SIZE, ByColour

from maskcf_fast.core.processes import Processes
from maskcf_fast.data import LoaderConfig, build_loader
from maskcf_fast.evaluation import Reader, Spec, measure, read_benchmark
from maskcf_fast.evaluation.classes import imagenet_classes


@pytest.fixture(scope="session")
def wnids():
    pytest.importorskip("timm")
    return imagenet_classes()


@pytest.fixture
def score(wnids):
    """``score("imagenet-r:PATH", seconds=(…))``: benchmark and results of `ByColour`."""

    def scored(text, *, classes=wnids, seconds=(), **options):
        benchmark = read_benchmark(Spec.parse(text), Reader(classes, **options))
        config = LoaderConfig(batch_size=4, image_size=SIZE, train=False, threads=0, border=benchmark.border)
        batches = build_loader(benchmark.source, config, "torch")
        processes = Processes(0, 1, torch.device("cpu"))
        return benchmark, measure(ByColour(len(classes), seconds), benchmark, batches, processes)

    return scored
