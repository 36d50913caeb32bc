"""What the columns of a classifier's output stand for: the names of its classes, in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UserError
from ..core.files import read_lines
from ..core.optional import need
from ..data import scan_images
from ..data.manifest import some
from ..data.scan import class_folders
from ..data.shards import is_shards
from ..models.weights import read_class_names

WNID = re.compile(r"n\d{8}")  # a WordNet id, which is what ImageNet's class folders are called


def imagenet_classes() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1000 classes in their usual order, which is the sorted one.

    Raises:
        ImportError: timm, whose list it is, is not installed.
    """
    need("timm", instead="pass --classes FILE with one folder name per line in the order of the model's outputs")
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def numbered_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """What ImageNet's class numbers 0 to 999 mean: ``classes`` themselves where they are 1000 sorted WordNet ids."""
    if len(classes) == 1000 and all(map(WNID.fullmatch, classes)) and list(classes) == sorted(classes):
        return tuple(classes)
    return imagenet_classes()


def read_classes(source: str) -> tuple[str, ...]:
    """Class names from a text file, one per line; "imagenet" stands for `imagenet_classes`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No names, or a name twice.
    """
    if source == "imagenet":
        return imagenet_classes()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f'--classes {source}: no such file (one class per line, or "imagenet")')
    names = tuple(read_lines(path))
    if not names:
        raise UserError(f"{path} holds no class names: write one per line, in the order of the model's outputs")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"{path} names {some(twice)} more than once")
    return names


def classes_of_run(weights: Path, train: Path | None, outputs: int, source: str | None = None) -> tuple[str, ...]:
    """The classes of a run's model.

    Args:
        weights: File of the model, which names them.
        train: What it was trained on, whose classes they are if the file is of a version that named none.
        outputs: Outputs of the model.
        source: What `read_classes` reads instead.

    Returns:
        ``outputs`` names.

    Raises:
        ImportError, OSError, ValueError: There is no source of names, or it has another number of them.
    """
    stored = read_class_names(weights)
    if source is not None:
        names, where = read_classes(source), f"--classes {source}"
    elif stored is not None:
        names, where = stored, str(weights)
    elif train is not None and (train.is_dir() or train.suffix == ".tar"):
        names, where = scan_images(train, on_bad_image="skip", verify=False).classes, f"the training folder {train}"
    elif outputs == 1000:
        names, where = imagenet_classes(), "ImageNet's list"
    else:
        raise FileNotFoundError(
            f"the names of the model's {outputs} classes are not known, because neither {weights} has them nor is its "
            f"training folder {train} there: pass --classes FILE with one folder name per line in the order of the "
            "model's outputs"
        )
    if len(names) != outputs:
        raise UserError(
            f"the model has {outputs} outputs, but {where} has {len(names)} classes: pass --classes FILE with one "
            "folder name per line in the order of the model's outputs"
        )
    return names


def data_folder(source: Path) -> Path:
    """Where a data set lies: ``source`` without ``#COLUMN``, or beside the tar shards that it is, or a pattern of."""
    if source.suffix.lower() == ".tar":
        return source.parent
    folder, mark, _ = source.name.rpartition("#")
    return source.with_name(folder) if mark and folder and not source.exists() else source


def class_names(source: Path) -> tuple[str, ...]:
    """Names of the classes that a data set of class folders or tar shards has images of; none where it is neither.

    Raises:
        OSError, ValueError: Shards that are missing or damaged.
    """
    folders = class_folders(source) if source.is_dir() else ()
    shards = not folders and (is_shards(source))
    return scan_images(source, on_bad_image="skip", verify=False).with_images().classes if shards else folders
