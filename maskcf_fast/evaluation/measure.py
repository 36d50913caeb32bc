"""What a classifier gets right on a benchmark, and how sure of it it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.precision import autocast, check_precision, float32_products
from ..core.processes import Processes
from ..core.schema import Range
from ..data import Batch
from .benchmark import Benchmark
from .metrics import BINS, calibration_error, wilson

TOP = 5

Count = Annotated[int, Range(0, 2**40)]
Percent = Annotated[float, Range(0, 100)]


@dataclass(frozen=True)
class Measurement:
    """Results of one model on one benchmark; shares in per cent.

    Attributes:
        images: How many images there are.
        top1: Images whose best output is right.
        low: Lower end of its 95 % interval.
        high: Upper end.
        top5: Images with a right output among the best five; None where there are no more to choose from.
        ece: Expected calibration error over 15 bins, of the confidence in the predicted output.
        per_class: For each class of the data set, images and how many of them are right.
    """

    images: Count
    top1: Percent
    low: Percent
    high: Percent
    top5: Percent | None
    ece: Percent
    per_class: dict[str, tuple[Count, Count]]


class Accumulator:
    """Counts over batches.

    Args:
        benchmark: What is right, and what may be predicted.
        device: Where the outputs are.
    """

    def __init__(self, benchmark: Benchmark, device: torch.device) -> None:
        self.classes = benchmark.source.classes
        self.targets = benchmark.targets.to(device)
        self.allowed = benchmark.allowed.to(device)
        choices = int(benchmark.allowed.sum())
        self.top = TOP if choices > TOP else None
        # Per class: images, right; per bin: predictions, right; overall: among the best five, not finite.
        self.by_class = torch.zeros(2, len(self.classes), dtype=torch.int64, device=device)
        self.by_bin = torch.zeros(2, BINS, dtype=torch.int64, device=device)
        self.overall = torch.zeros(2, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(BINS, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: ``[N, outputs]``, and ``[N]`` int64 labels of the data set.

        Outputs outside the benchmark's classes do not count, neither for the prediction nor for its confidence.
        """
        right = self.targets[labels]
        logits = logits.float().masked_fill(~self.allowed, -torch.inf)
        predicted, confidence = logits.argmax(dim=1), logits.softmax(dim=1).amax(dim=1)
        correct = right.gather(1, predicted[:, None])[:, 0]
        self.by_class[0].index_add_(0, labels, torch.ones_like(labels))
        self.by_class[1].index_add_(0, labels, correct.long())
        if self.top is not None:
            best = logits.topk(self.top, dim=1).indices
            self.overall[0] += (right.gather(1, best).any(dim=1) | correct).sum()
        self.overall[1] += (~confidence.isfinite()).sum()
        # Bins are open below and closed above: (0, 1/15], (1/15, 2/15], …
        bins = (confidence.double().nan_to_num(1.0) * BINS).ceil().long().clamp(1, BINS) - 1
        self.by_bin[0].index_add_(0, bins, torch.ones_like(labels))
        self.by_bin[1].index_add_(0, bins, correct.long())
        self.confidence.index_add_(0, bins, confidence.double())

    def result(self, processes: Processes) -> Measurement:
        """The results over all processes.

        Raises:
            ValueError: The model gave outputs that are not finite.
        """
        for counts in (self.by_class, self.by_bin, self.overall, self.confidence):
            processes.sum(counts)
        among_best, broken = self.overall.tolist()
        seen, correct = self.by_class.tolist()
        n, right = sum(seen), sum(correct)
        if broken:
            raise UserError(f"the model's outputs are NaN or infinite for {broken} of {n} images")
        predictions, hits = self.by_bin.cpu().numpy()
        low, high = wilson(right, n)
        return Measurement(
            images=n,
            top1=100 * right / n,
            low=low,
            high=high,
            top5=None if self.top is None else 100 * among_best / n,
            ece=calibration_error(predictions, hits, self.confidence.cpu().numpy()),
            per_class={name: (k, hit) for name, k, hit in zip(self.classes, seen, correct, strict=True) if k},
        )


@torch.no_grad()
def measure(
    model: nn.Module, benchmark: Benchmark, batches: Iterable[Batch], processes: Processes, precision: str = "fp32"
) -> Measurement:
    """Run a classifier over a benchmark, every image once over all processes.

    Args:
        model: Maps uint8 images ``[N, S, S, 3]`` to logits ``[N, outputs]``.
        benchmark: What is right.
        batches: This process's share of the benchmark's images.
        processes: The processes that share them.
        precision: "fp32", "tf32" or "bf16".

    Raises:
        ValueError: The model gave outputs that are not finite.
    """
    check_precision(processes.device, precision)
    was_training = model.training
    model.eval()
    metrics = Accumulator(benchmark, processes.device)
    passes = 0
    for batch in batches:
        with float32_products(precision), autocast(processes.device, precision):
            logits = model(batch.images)
        metrics.add(logits, batch.labels)
        passes += 1
    # Where parameters are divided among the processes, all must run the model equally often. All must also ask.
    most = max(processes.gather(passes))
    for _ in range(most - passes if passes else 0):
        model(batch.images)
    model.train(was_training)
    return metrics.result(processes)
