"""Images that the training loaders do not read: of Hugging Face data sets on disk, and with a border to cut off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..core.errors import UserError
from ..data import Batch, LoaderConfig, LoadingError, Manifest
from ..data.images import read_image
from ..data.torch_loader import start_workers, without_traceback
from ..data.transforms import resize_and_crop
from ..data.verify import image_file


@dataclass(frozen=True)
class DiskImages:
    """The images of a Hugging Face data set, like a `Manifest`.

    Attributes:
        root: Folder of the data set.
        classes: Names of its classes; a label is an index into them.
        rows: Row of each image in ``table``.
        labels: Class index of each image.
        table: The ``datasets.Dataset``.
        column: Its column of images.
    """

    root: Path
    classes: tuple[str, ...]
    rows: tuple[int, ...]
    labels: tuple[int, ...]
    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Iterable[int]) -> DiskImages:
        """The images of these indices, in this order; the classes stay."""
        kept = [int(i) for i in indices]
        return replace(self, rows=tuple(self.rows[i] for i in kept), labels=tuple(self.labels[i] for i in kept))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the classes, rows and labels, and of the data set's own description of its contents."""
        described = f"{self.classes} {self.rows} {self.labels} {self.column}".encode()
        return hashlib.sha256(described + (self.root / "state.json").read_bytes()).hexdigest()


def read_disk_images(root: Path) -> DiskImages:
    """Open a data set that ``datasets`` saved with ``save_to_disk``.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: It holds several splits, or not exactly one column of images and one of class labels.
    """
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in root.glob("*/state.json"))
        raise UserError(
            f"{root} holds the splits {', '.join(splits)}: pass the folder of one, such as {root / splits[0]}"
        )
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise ImportError(f"{root} is a Hugging Face data set, which needs: pip install datasets") from error
    table = datasets.load_from_disk(str(root))
    pictures = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(pictures) != 1 or len(labels) != 1:
        raise UserError(
            f"{root} must have one column of images and one of class labels, "
            f"its columns are {', '.join(f'{name} ({type(kind).__name__})' for name, kind in table.features.items())}"
        )
    values = tuple(table[labels[0]])
    if unlabelled := [i for i, value in enumerate(values) if value is None or value < 0]:
        raise UserError(f"{len(unlabelled)} images of {root} have no label, first in row {unlabelled[0]}: remove them")
    classes = tuple(table.features[labels[0]].names)
    return DiskImages(root.absolute(), classes, tuple(range(len(values))), values, table, pictures[0])


class DiskLoader:
    """Decodes with PIL, like the torch loader in evaluation, any source and with a border cut off.

    Args:
        source: The images.
        config: The settings of an evaluation loader.
        border: Pixels to cut off at each side before anything else.
    """

    decoder = f"PIL {PIL.__version__}"

    def __init__(self, source: Manifest | DiskImages, config: LoaderConfig, border: int = 0) -> None:
        n, rank, world = len(source), config.rank, config.world_size
        share = range(n * rank // world, n * (rank + 1) // world)
        self._device = torch.device(config.device)
        self._loader: DataLoader = DataLoader(
            Subset(_Decoded(source, config.image_size, border), share),
            batch_size=config.batch_size,
            num_workers=config.threads,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # of its own: it would draw from the global one
        )

    def __iter__(self) -> Iterator[Batch]:
        try:
            for images, labels, indices in start_workers(self._loader):
                images, labels = (x.to(self._device, non_blocking=True) for x in (images, labels))
                yield Batch(images, labels, indices)
        except RuntimeError as error:
            raise LoadingError(without_traceback(error)) from error


class _Decoded(Dataset):
    """Map an index to ``(pixels uint8 [S, S, 3], label, index)``."""

    def __init__(self, source: Manifest | DiskImages, size: int, border: int) -> None:
        self.source, self.size, self.border = source, size, border

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        source, border = self.source, self.border
        if isinstance(source, Manifest):
            where = str(source.root / source.paths[index])
        else:
            where = f"row {source.rows[index]} of {source.root}"
        try:
            if isinstance(source, Manifest):
                span = None if source.spans is None else source.spans[index]
                image = read_image(image_file(source.root, source.paths[index], span), span)
            else:
                image = source.table[source.rows[index]][source.column].convert("RGB")
            if min(image.size) <= 2 * border:
                raise UserError(f"its sides {image.size} leave nothing inside a border of {border}")
            if border:
                image = image.crop((border, border, image.width - border, image.height - border))
            pixels = resize_and_crop(image, self.size)
        except Exception as error:  # PIL lets anything through, from SyntaxError to struct.error
            raise RuntimeError(f"{where}: {error}") from error
        return torch.from_numpy(pixels), source.labels[index], index
