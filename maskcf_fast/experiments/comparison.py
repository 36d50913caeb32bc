"""Several runs that are compared: trained once, continued where they stopped, and reused; for `demo` and `table`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from ..core.errors import UserError
from ..core.files import atomic_write
from ..core.processes import Processes
from ..core.schema import Range, conform, read_record
from ..data import Manifest
from ..training.folder import AUTO
from ..training.settings import ModelConfig, TrainConfig, changed_settings
from ..training.trainer import Trainer


def train(config: TrainConfig, processes: Processes, title: str) -> dict[str, float]:
    """Train, or continue what was interrupted: final accuracy by test set."""
    return Trainer(dataclasses.replace(config, resume=AUTO), processes, quiet=True, title=title).run()


def train_or_reuse(config: TrainConfig, processes: Processes, title: str, basis: str = "") -> None:
    """Train a run, unless it is finished already.

    Args:
        config: The run, with its folder in ``out``.
        processes: The processes that train it.
        title: What the progress bar says.
        basis: What the run depends on besides its settings and initial weights, such as a checksum of its data.

    Raises:
        FileNotFoundError: The initial weights are not there.
        ValueError: The folder holds a run with other settings, initial weights or basis, or one that is damaged.
    """
    assert config.out is not None
    path, initial = config.out / "result.json", weights_checksum(config.model)
    if path.exists():
        try:
            saved = read_record(path, dict[str, Any])
            conform(saved.get("accuracy"), dict[str, Annotated[float, Range(0, 100)]], f"{path}: accuracy")
            changed = changed_settings(config, config.out / "config.yaml")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{config.out} holds a finished run that cannot be read ({error}): choose another --out, or remove it"
            ) from error
        # A run of an earlier version did not keep what it started from.
        if changed or saved.get("basis") != basis or saved.get("initial", initial) != initial:
            what = ", ".join(changed) or "other data or initial weights"
            raise UserError(
                f"{config.out} holds a run with other settings ({what}): choose another --out, or remove it"
            )
        return
    accuracy = train(config, processes, title)
    if processes.main:
        content = {"basis": basis, "initial": initial, "accuracy": accuracy}
        atomic_write(path, json.dumps(content, indent=1).encode())
    processes.barrier()  # the other processes read what the main one has written


def weights_checksum(config: ModelConfig) -> str:
    """SHA-256, in hex, of the files of the initial weights and head. Models that are named are told by their name.

    Raises:
        FileNotFoundError: One of the files is not there.
    """
    digest = hashlib.sha256()
    for path in (config.weights, config.head):
        if path is not None and str(path) != "random":
            if not path.is_file():
                raise FileNotFoundError(f"no weights at {path}: restore them")
            stat = path.stat()
            digest.update(_checksum(path, stat.st_size, stat.st_mtime_ns))
        digest.update(b"|")
    return digest.hexdigest()


@functools.cache  # many runs start from the same file
def _checksum(path: Path, size: int, time: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def images_checksum(manifest: Manifest) -> str:
    """SHA-256, in hex, of the names, labels and sizes of images; unlike their times of change, a copy keeps them."""
    sizes = [stamp and stamp[:-1] for stamp in manifest.stamps()]
    return hashlib.sha256(f"{manifest.fingerprint} {sizes}".encode()).hexdigest()


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
