"""What is installed, and which implementation of each op runs here."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from pkgutil import iter_modules

import torch

from . import extension
from .dispatch import DEVICES, IMPLEMENTATIONS, resolve, why_not

OPS = [module.name for module in iter_modules([str(Path(__file__).parent)]) if module.ispkg]


def versions(package: str) -> dict[str, str]:
    """Versions of the package and of what the ops depend on."""
    found = {"maskcf_fast": package, "python": platform.python_version(), "torch": torch.__version__}
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
        for impl in IMPLEMENTATIONS:
            if impl not in DEVICES[device]:
                continue
            reason = why_not(package, impl, there)
            names = [name for name, taken in chosen.items() if taken == impl]
            auto = "" if not names else " (auto)" if len(names) == len(chosen) else f" (auto for {names[0]})"
            answer = f"no: {reason.splitlines()[0]}" if reason else f"yes{auto}"
            lines.append(f"  {op:<10} {impl:<10} {answer}")
    return lines


def describe(version: str) -> str:
    """It all, as text to print; ``version`` is the package's."""
    lines = []
    for title, rows in (("Versions", versions(version)), ("Extension", extension_rows())):
        lines += [title, *(f"  {name:<22} {value}" for name, value in rows.items())]
    for device in DEVICES:
        there = device != "cuda" or torch.cuda.is_available()
        lines.append(f"Implementations for tensors on {device}" + ("" if there else " (none here: what would run)"))
        lines += table(device)
    return "\n".join(lines)
