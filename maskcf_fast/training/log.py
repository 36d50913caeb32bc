"""What a run leaves behind: its settings, its environment, and its metrics."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import atomic_write, explained
from .settings import TrainConfig, to_yaml


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events to the run's folder.

    Args:
        folder: The run's folder, made if missing.
        step: Drop what was logged after this step: a resumed run writes it again.
        evaluated: Whether the accuracy after this step stays, too.
    """

    def __init__(self, folder: Path, step: int = 0, evaluated: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, step, evaluated) if path.exists() else []
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", buffering=1)
        self._board = _board(folder / "tensorboard", purge_step=step + evaluated)
        for line in kept:
            if line["step"] == step and not evaluated:
                self._add_scalars(line)

    def write(self, step: int, **values: Any) -> None:
        """One line, and a TensorBoard scalar for every number in it."""
        line = {"step": step, **values}
        text = json.dumps(line) + "\n"
        with explained(self._file.name, len(text)):
            self._file.write(text)
        self._add_scalars(line)

    def _add_scalars(self, line: dict[str, Any]) -> None:
        with explained(self._file.name, 0):  # TensorBoard's thread says later, and not where, what it could not write
            for name, value in line.items():
                if self._board is not None and name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["step"])

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """A picture for TensorBoard, uint8 ``[H, W, 3]``."""
        if self._board is not None:
            with explained(self._file.name, 0):
                self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        with suppress(OSError):  # of a full disk, what was being written has spoken
            self._file.close()
            if self._board is not None:
                self._board.close()


def _board(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer; None where it is not installed, which costs a run its pictures only."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: metrics.jsonl has the figures, and there are no pictures")
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def _lines_until(path: Path, step: int, evaluated: bool) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` up to a step; one that cannot be read is dropped, and named unless it is the last.

    A crash may cut the last one off. What is odd before it, the disk has done, and it is no reason not to go on.
    """
    raw = path.read_bytes().splitlines()
    kept = []
    for number, text in enumerate(raw, start=1):
        try:
            line = json.loads(text)
            at = line["step"]
            accuracy = any(name.startswith("accuracy/") for name in line)
            if type(at) is int and (at < step or (at == step and (evaluated or not accuracy))):
                kept.append(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(raw):
                print(f"{path}: line {number} cannot be read and is dropped")
    return kept


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and command of this process."""
    versions = {}
    for name in ("maskcf-fast", "torch", "triton", "numpy", "nvidia-dali-cuda130", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_run_files(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """``config.yaml`` and ``environment.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.yaml", to_yaml(config).encode())
    atomic_write(folder / "environment.json", json.dumps(describe_environment(device), indent=2).encode())
