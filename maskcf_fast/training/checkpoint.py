"""Files that hold a run's state: written whole or not at all, and read without executing code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..core.files import atomic_write, explained


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``; on any failure the file that was there before stays.

    Raises:
        OSError: It could not be written (disk full, no permission), with the path and the remedy.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with explained(path, buffer.tell()):
        atomic_write(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a complete checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: the run stopped before it wrote one; start it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or no checkpoint ({error}): start the run again elsewhere") from error
