"""What is installed and which implementation of each op runs here: ``python -m maskcf_fast.info``."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

import torch

from . import __version__
from .ops import extension
from .ops.dispatch import DEVICES, MODULES, resolve, why_not

OPS = ("select", "refill", "patchify", "gather", "relevance")


def versions() -> dict[str, str]:
    """Versions of what the ops depend on."""
    found = {"maskcf_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["GPU"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    else:
        found["GPU"] = "none that torch can use"
    return found


def extension_rows() -> dict[str, str]:
    """The build facts of the extension."""
    facts = extension.facts()
    rows = {"library": str(extension.library_path()), "loads": extension.loading_error() or "yes"}
    names = {
        "torch_target": "stable ABI of torch",
        "torch_headers": "built with headers of",
        "compiler": "C++ compiler",
        "cuda_compiler": "CUDA compiler",
        "why_no_cpu": "why no extension",
        "why_no_cuda": "why no CUDA kernels",
    }
    rows |= {title: str(facts[name]) for name, title in names.items() if facts.get(name)}
    if facts.get("cuda_archs"):
        rows["GPU architectures"] = ", ".join(f"sm_{arch}" for arch in facts["cuda_archs"])
    return rows


def table(device: str) -> list[str]:
    """A line per op and implementation: yes, or why not."""
    lines = []
    for op in OPS:
        package, there = f"maskcf_fast.ops.{op}", torch.device(device)
        chosen = {
            name: resolve(package, "auto", there, dtype=dtype)
            for name, dtype in (("float32", torch.float32), ("half precision", torch.bfloat16))
        }
        for impl in MODULES:
            if impl not in DEVICES[device]:
                continue
            reason = why_not(package, impl, there)
            names = [name for name, taken in chosen.items() if taken == impl]
            auto = "" if not names else " (auto)" if len(names) == len(chosen) else f" (auto for {names[0]})"
            answer = f"no: {reason.splitlines()[0]}" if reason else f"yes{auto}"
            lines.append(f"  {op:<10} {impl:<10} {answer}")
    return lines


def main() -> None:
    """Print it all."""
    for title, rows in (("Versions", versions()), ("Extension", extension_rows())):
        print(title)
        for name, value in rows.items():
            print(f"  {name:<22} {value}")
    for device in DEVICES:
        there = device != "cuda" or torch.cuda.is_available()
        print(f"Implementations for tensors on {device}" + ("" if there else " (none here: what would run)"))
        print("\n".join(table(device)))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
