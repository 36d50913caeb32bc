"""Files that hold a run's state: written whole or not at all, and read without executing code."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.files import atomic_write


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``; on any failure the file that was there before stays.

    Raises:
        OSError: It could not be written (disk full, no permission), with the path and the remedy.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _write(path, buffer.getvalue())


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


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a model's ``state_dict()`` as safetensors, whole or not at all; errors as `save_checkpoint`."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _write(path, safetensors.torch.save(cpu, metadata))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over a module's names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    try:
        atomic_write(path, data)
    except OSError as error:
        kept = "; the one before is intact" if path.exists() else ""
        message = f"cannot write {path} ({len(data) / 2**20:.1f} MiB): {error.strerror or error}{kept}. Free space, "
        raise OSError(error.errno, message + "then continue with --resume") from error
