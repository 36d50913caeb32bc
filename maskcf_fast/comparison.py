"""Several runs that are compared: trained once, continued where they stopped, and reused; for `demo` and `table`."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ._cache import atomic_write
from .evaluation import Reader, Results, Spec, Suite
from .training.config import TrainConfig, changed_settings
from .training.distributed import Processes
from .training.trainer import Trainer


class Result(NamedTuple):
    """What a run came to: final accuracy in percent by test set, and the speed of its training."""

    accuracy: dict[str, float]
    images_per_second: float
    reused: bool


def train(config: TrainConfig, processes: Processes, title: str) -> tuple[dict[str, float], float]:
    """Train, or continue what was interrupted: final accuracy by test set, and images per second."""
    assert config.out is not None
    if (config.out / "last.pt").exists():
        config = dataclasses.replace(config, resume=config.out)
    trainer = Trainer(config, processes, quiet=True, title=title)
    return trainer.run(), trainer.images_per_second


def train_or_reuse(config: TrainConfig, processes: Processes, title: str, basis: str = "") -> Result:
    """The result of a run, which is trained unless it is finished already.

    Args:
        config: The run, with its folder in ``out``.
        processes: The processes that train it.
        title: What the progress bar says.
        basis: What the run depends on besides its settings, such as a checksum of its data.

    Raises:
        ValueError: The folder holds a run with other settings, or of another basis.
    """
    assert config.out is not None
    path = config.out / "result.json"
    if path.exists():
        saved = json.loads(path.read_text())
        changed = changed_settings(config, config.out / "config.yaml")
        if changed or saved.get("basis") != basis:
            what = ", ".join(changed) or "other data or initial weights"
            raise ValueError(
                f"{config.out} holds a run with other settings ({what}): choose another --out, or remove it"
            )
        return Result(saved["accuracy"], saved["images_per_second"], True)
    accuracy, speed = train(config, processes, title)
    if processes.main:
        content = {"basis": basis, "accuracy": accuracy, "images_per_second": speed}
        atomic_write(path, json.dumps(content, indent=1).encode())
    processes.barrier()  # the other processes read what the main one has written
    return Result(accuracy, speed, False)


def build_suite(
    config: TrainConfig, specs: Sequence[Spec], reader: Reader, file: Path, processes: Processes, id: str | None = None
) -> Suite:
    """Test sets for the models of runs, decoded as the runs' own images are; ``file`` keeps what is measured."""
    return Suite(
        specs,
        reader,
        Results(file, writes=processes.main),
        processes,
        id=id,
        batch_size=max(1, config.optim.batch_size // (processes.world_size * config.optim.accumulate)),
        threads=config.data.threads,
        backend=config.data.backend,
    )


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
