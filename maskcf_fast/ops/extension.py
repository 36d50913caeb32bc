"""The compiled extension: where it is, what it was built for, and why it is absent. Loaded at the first use."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from . import building

REMEDY = "run `python -m maskcf_fast.build`"


def library_path() -> Path:
    """The library: ``MASKCF_LIBRARY``, or of those beside the package and in the cache the newest of this version."""
    if own := os.environ.get("MASKCF_LIBRARY"):
        return Path(own)
    places = [folder / building.LIBRARY for folder in building.output_folders()]
    there = [place for place in places if place.is_file()]
    best_last = sorted(there, key=lambda place: (not building.is_stale(place.parent), place.stat().st_mtime))
    return best_last[-1] if there else places[0]


def facts() -> dict[str, Any]:
    """What the build recorded beside the library; empty if nothing was ever built."""
    return building.facts_of(library_path().parent)


@functools.cache
def loading_error() -> str | None:
    """Load the library, once. Why it could not be, or None: then the ops of ``torch.ops.maskcf`` have its kernels."""
    path = library_path()
    if os.environ.get("MASKCF_NATIVE", "1") == "0":
        return "the extension is switched off (MASKCF_NATIVE=0)"
    if not path.is_file():
        reason = facts().get("why_no_cpu")
        return f"the extension is not built ({reason or REMEDY}; a running process must be started again)"
    if building.is_stale(path.parent):  # its ops would take other arguments, or abort
        reason = f"the extension {path} was built from other sources than those of this version: {REMEDY}"
        warnings.warn(f"{reason}. Until then the ops run without it, more slowly", stacklevel=2)
        return reason
    return load(path)


def load(path: Path) -> str | None:
    """Load a library; why it could not be, or None."""
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"the extension does not load into PyTorch {torch.__version__}: {error}; {REMEDY}"
    return None


@functools.cache
def emulated() -> bool:
    """Whether the library is tests/native/emulated.py's: the CUDA kernels, for tensors on the CPU."""
    return bool(facts().get("emulated"))


def why_not(part: str, op: str = "select_patches") -> str | None:
    """Why the extension's ``"cpu"`` or ``"cuda"`` kernel of an op cannot be used; None if it can."""
    if error := loading_error():
        return error
    if part == "cpu" and emulated():
        return "the extension holds the CUDA kernels on a CPU, for tests"
    key = "CUDA" if part == "cuda" and not emulated() else "CPU"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"maskcf::{op}", key):
        return None
    if torch._C._dispatch_has_kernel_for_dispatch_key("maskcf::select_patches", key):
        return f"the extension has no {key} kernel of it ({REMEDY} if this version has one)"
    return f"the extension was built without {key} kernels ({facts().get(f'why_no_{part}') or REMEDY})"
