"""Accuracy of a model on a data set."""

from __future__ import annotations

import torch
from torch import nn

from ..core.precision import autocast
from ..core.processes import Processes
from ..data import Loader


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, processes: Processes, precision: str = "fp32") -> float:
    """Top-1 accuracy in percent, every image counted once over all processes."""
    was_training = model.training
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=processes.device)  # correct, seen
    for images, labels, _ in loader:
        with autocast(processes.device, precision):
            logits = model(images)
        counts[0] += (logits.argmax(dim=1) == labels).sum()
        counts[1] += len(labels)
    # Where parameters are divided among the processes, all must run the model equally often. All must also ask.
    most = max(processes.gather(len(loader)))
    for _ in range(most - len(loader) if len(loader) else 0):
        model(images)
    model.train(was_training)
    correct, seen = processes.sum(counts).tolist()
    return 100 * correct / seen
