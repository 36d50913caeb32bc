"""Image folders, and loaders of uint8 batches that resume exactly."""

from .loader import Batch, Loader, LoaderConfig, build_loader
from .manifest import Manifest, scan_image_folder

__all__ = ["Batch", "Loader", "LoaderConfig", "Manifest", "build_loader", "scan_image_folder"]
