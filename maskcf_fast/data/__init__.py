"""Images on disk as batches of pixels: the manifest of folders or tar shards, and the loaders."""

from ..core.optional import need

need("PIL", "tqdm")

from .loader import Batch, Loader, LoaderConfig, LoadingError, build_loader
from .manifest import Manifest, scan_image_folder
from .shards import scan_images, scan_tar_shards

__all__ = [
    "Batch",
    "Loader",
    "LoaderConfig",
    "LoadingError",
    "Manifest",
    "build_loader",
    "scan_image_folder",
    "scan_images",
    "scan_tar_shards",
]
