"""Images on disk as batches of pixels: one reader of pictures, the manifest of folders or tar shards, the loaders."""

from ..core.optional import need

need("PIL", "tqdm")

from .build import build_loader
from .images import ImageError, read_image
from .loader import Batch, Loader, LoaderConfig, LoadingError
from .manifest import Manifest
from .scan import scan_images

scan_image_folder = scan_images  # its name from before it knew shards

__all__ = [
    "Batch",
    "ImageError",
    "Loader",
    "LoaderConfig",
    "LoadingError",
    "Manifest",
    "build_loader",
    "read_image",
    "scan_image_folder",
    "scan_images",
]
