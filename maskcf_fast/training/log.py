"""What a run leaves behind: its settings, its environment, and its metrics."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import atomic_write
from .settings import TrainConfig, to_yaml


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events to the run's folder.

    Args:
        folder: The run's folder, made if missing.
        step: Drop what was logged after this step, by default everything: a resumed run writes it again.
    """

    def __init__(self, folder: Path, step: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            atomic_write(path, "".join(line + "\n" for line in lines).encode())
        self._file = path.open("a", buffering=1)
        self._board = _board(folder / "tensorboard", purge_step=step + 1 if step >= 0 else None)

    def write(self, step: int, **values: Any) -> None:
        """One line, and a TensorBoard scalar for every number in it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self._board is not None and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """A picture for TensorBoard, uint8 ``[H, W, 3]``."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, purge_step: int | None) -> Any:
    """TensorBoard's writer; None where it is not installed, which costs a run its pictures only."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: metrics.jsonl has the figures, and there are no pictures")
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def _step_of(line: str) -> float:
    """The step of a logged line; a line cut off by a crash counts as one to drop."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


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
