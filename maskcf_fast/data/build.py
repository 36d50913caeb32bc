"""The choice of a loader."""

from __future__ import annotations

import sys
from typing import Literal

from ..core.errors import UserError
from ..core.optional import installed
from .cached_loader import CachedLoader
from .dali import DaliLoader
from .loader import Loader, LoaderConfig
from .manifest import Manifest
from .torch_loader import TorchLoader


def build_loader(
    manifest: Manifest, config: LoaderConfig, backend: Literal["auto", "dali", "torch"] = "auto"
) -> Loader:
    """Build the loader for a list of images.

    Args:
        manifest: The images.
        config: The settings.
        backend: "dali" decodes on the GPU if that is the device; "torch" decodes with PIL in worker processes;
            "auto" is DALI where it is installed. The order is the same.

    Returns:
        The loader, at the start of its first epoch. With a cache, all images have been decoded.

    Raises:
        ImportError: "dali" was asked for and is not installed.
        LoadingError: An image could not be read or decoded for the cache.
        OSError: The cache cannot be written, or does not fit on the disk.
        RuntimeError: The device is a GPU and there is none.
        ValueError: An unknown backend, fewer training images than one batch on each rank, or a "device" cache
            that does not fit in the device's memory.
    """
    if backend not in ("auto", "dali", "torch"):
        raise UserError(f'backend must be "auto", "dali" or "torch", got {backend!r}')
    if backend == "auto" and not installed("nvidia.dali"):
        if config.rank == 0:
            print("NVIDIA DALI is not installed: images are decoded with PIL, which is slower.", file=sys.stderr)
        backend = "torch"
    loader = TorchLoader(manifest, config) if backend == "torch" else DaliLoader(manifest, config)
    return loader if config.cache == "none" else CachedLoader(loader)
