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


def need(*modules: str) -> None:
    """Raise `MissingLibraryError`, which names the command that installs it, unless all these modules are installed."""
    for module in modules:
        if not _installed(module):
            package = f"'maskcf-fast[{EXTRAS[module]}]'" if module in EXTRAS else PACKAGES.get(module, module)
            raise MissingLibraryError(f"{module} is not installed: pip install {package}")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of it is missing
        return False
