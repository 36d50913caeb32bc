"""Libraries that only a part of the package needs: the extra that installs each, named when one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import MissingLibraryError

EXTRAS = {
    **dict.fromkeys(("matplotlib", "PIL", "sklearn", "tensorboard", "tqdm", "tyro", "yaml"), "train"),
    **dict.fromkeys(("onnx", "onnxscript"), "onnx"),
}
"""Modules by the extra of this package that installs them; other libraries are installed by their own name."""
PACKAGES = {"open_clip": "open_clip_torch", "nvidia.dali": "nvidia-dali-cuda130"}


def need(*modules: str, instead: str = "") -> None:
    """Raise `MissingLibraryError` unless all these modules are installed.

    It names the command that installs the one that is missing, and what may be done ``instead``.
    """
    for module in modules:
        if not installed(module):
            package = f"'maskcf-fast[{EXTRAS[module]}]'" if module in EXTRAS else PACKAGES.get(module, module)
            otherwise = f", or {instead}" if instead else ""
            raise MissingLibraryError(f"{module} is not installed: pip install {package}{otherwise}")


def installed(module: str) -> bool:
    """Whether there is such a module, which is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of it is missing
        return False
