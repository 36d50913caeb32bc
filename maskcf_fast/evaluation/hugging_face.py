"""The images of Hugging Face data sets on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.optional import need
from ..data import ImageError, Manifest
from ..data.images import ImageReader, read_file
from .classes import data_folder

NAMES = ("label", "labels", "class", "class_name", "category")  # of a column of class names that are plain text


@dataclass(frozen=True)
class TableImages(Manifest):
    """The images of a table; their paths are "row N".

    Attributes:
        table: The ``datasets.Dataset``, with one column of encoded images.
        column: Its name.
    """

    table: Any = None
    column: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the classes, rows and labels, and of the data set's own description of its contents."""
        stored = "" if self.upright else " as stored"
        described = f"{self.classes} {self.paths} {self.labels} {self.column}{stored}".encode()
        return hashlib.sha256(described + (self.root / "state.json").read_bytes()).hexdigest()

    def stamps(self) -> list[list[int] | None]:
        """Size and time of change of the files of the table, for every row."""
        files = [path.stat() for path in sorted(self.root.glob("*.arrow"))]
        stamp = [number for file in files for number in (file.st_size, file.st_mtime_ns)]
        return [stamp] * len(self)

    def reader(self) -> ImageReader:
        """What reads the images."""
        return _Rows(self)


class _Rows(ImageReader):
    def __init__(self, images: TableImages) -> None:
        self.images, self.upright = images, images.upright

    def name(self, index: int) -> str:
        return f"{self.images.paths[index]} of {self.images.root}"

    def bytes_of(self, index: int) -> bytes:
        cell = self.images.table[int(self.images.paths[index].removeprefix("row "))][self.images.column]
        if not cell or (cell["bytes"] is None and cell["path"] is None):
            raise ImageError("holds no image")
        return cell["bytes"] if cell["bytes"] is not None else read_file(cell["path"])


def read_table(source: Path, known: Collection[str] = ()) -> TableImages:
    """Open a data set that ``datasets`` saved with ``save_to_disk``.

    Args:
        source: Its folder; ``FOLDER#COLUMN`` names the column of class labels.
        known: Class names that tell which of several columns is meant.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: It holds several splits or image columns, no labels, or several columns of labels of which not
            exactly one is of the ``known`` classes.
    """
    root = data_folder(source)
    wanted = "" if root == source else source.name.rpartition("#")[2]
    if (root / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in root.glob("*/state.json"))
        raise UserError(
            f"{root} holds the splits {', '.join(splits)}: pass the folder of one, such as {root / splits[0]}"
        )
    need("datasets", instead=f"take images in class folders: {root} is a Hugging Face data set")
    datasets: Any = import_module("datasets")
    try:
        table = datasets.load_from_disk(str(root))
    except Exception as error:  # its own, Arrow's, and whatever comes up in files that are damaged or empty
        raise UserError(f"datasets cannot open {root}: {error!r}; save it again with save_to_disk") from error
    pictures = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    kinds = table.features.items()
    columns = {name: tuple(kind.names) for name, kind in kinds if isinstance(kind, datasets.ClassLabel)}
    if wanted or not columns:  # names as plain text
        texts = [name for name, kind in kinds if getattr(kind, "dtype", "") == "string"]
        texts = [name for name in texts if (name == wanted if wanted else name.lower() in NAMES)]
        columns |= {name: tuple(sorted({text for text in table.unique(name) if text})) for name in texts}
    fitting = [wanted] if wanted else [name for name, names in columns.items() if set(names) & set(known)]
    if len(columns) == 1 and not wanted:
        fitting = list(columns)
    if len(pictures) != 1 or len(fitting) != 1 or fitting[0] not in columns:
        found = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in kinds)
        raise UserError(
            f"{root} must have one column of images and one of class labels, its columns are {found}; "
            f"{root}#COLUMN chooses the labels"
        )
    [column] = fitting
    classes = columns[column]
    index: dict[Any, int] = {name: i for i, name in enumerate(classes)} | {i: i for i in range(len(classes))}
    values = table[column]
    if unlabelled := [row for row, value in enumerate(values) if value not in index]:
        raise UserError(f"{len(unlabelled)} images of {root} have no label, first in row {unlabelled[0]}: remove them")
    encoded = table.select_columns(pictures).cast_column(pictures[0], datasets.Image(decode=False))
    return TableImages(
        root=root.absolute(),
        classes=classes,
        paths=tuple(f"row {row}" for row in range(len(values))),
        labels=tuple(index[value] for value in values),
        table=encoded,
        column=pictures[0],
    )
