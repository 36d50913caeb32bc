"""Images on disk as batches of pixels: the manifest of a folder, and the loaders."""

from .loader import Batch, Loader, LoaderConfig, LoadingError, build_loader
from .manifest import Manifest, scan_image_folder

__all__ = ["Batch", "Loader", "LoaderConfig", "LoadingError", "Manifest", "build_loader", "scan_image_folder"]
