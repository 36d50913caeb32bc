"""ObjectNet (Barbu et al., NeurIPS 2019): its own class names, of which some mean several ImageNet classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UserError
from ..core.files import decode_text
from ..core.schema import read_record
from .classes import data_folder

BORDER = 2  # every image has a red frame of this many pixels, put there to tell it from training data
FILES = {  # of mappings, and what the JSON files hold
    "folder_to_objectnet_label.json": dict[str, str],
    "objectnet_to_imagenet_1k.json": dict[str, str],
    "pytorch_to_imagenet_2012_id.json": dict[str, int],
    "imagenet_to_label_2012_v2": None,
}


def find_objectnet(root: Path) -> tuple[Path, Path] | None:
    """The images and the folder of mappings, given the data set's folder, its ``images`` or shards in that, or None."""
    for images in (root.absolute() / "images", root.absolute()):
        folder = data_folder(images)
        mappings = folder.parent / "mappings"
        if folder.name == "images" and folder.is_dir() and mappings.is_dir():
            return images, mappings
    return None


def objectnet_meanings(mappings: Path, folders: Sequence[str], numbered: Sequence[str]) -> list[tuple[str, ...]]:
    """The ImageNet classes of each of ObjectNet's folders.

    Args:
        mappings: Folder ``mappings`` of the data set, with its four files. ``folder_to_objectnet_label.json``
            names a folder's class; ``objectnet_to_imagenet_1k.json`` lists that class's ImageNet labels, separated
            by "; "; line n of ``imagenet_to_label_2012_v2`` is the label of ImageNet class n in the order of 2012,
            and ``pytorch_to_imagenet_2012_id.json`` gives n for the usual class numbers.
        folders: Names of the image folders.
        numbered: Class of each ImageNet class number, 0 to 999.

    Returns:
        For each folder the classes that are right; none for a class that ImageNet lacks.

    Raises:
        FileNotFoundError: A mapping file is missing.
        ValueError: A mapping is damaged, lacks a folder, or names an unknown or ambiguous ImageNet class.
    """
    if missing := [name for name in FILES if not (mappings / name).is_file()]:
        raise FileNotFoundError(f"{mappings} lacks {', '.join(missing)}: they come with ObjectNet, extract them again")
    folders_file, translations_file, numbers_file, lines_file = (mappings / name for name in FILES)
    try:
        labels, translations, lines_of = (read_record(mappings / name, kind) for name, kind in FILES.items() if kind)
    except UserError as error:
        raise UserError(f"{error}: extract it from ObjectNet again") from error
    lines = decode_text(lines_file.read_bytes(), lines_file).splitlines()
    numbers: dict[str, list[int]] = {}
    for number, line in lines_of.items():
        if not 0 <= line < len(lines) or not number.isdecimal() or int(number) >= len(numbered):
            raise UserError(f"{numbers_file}: class {number} is said to be in line {line} of {len(lines)}")
        numbers.setdefault(lines[line].strip(), []).append(int(number))

    def classes(folder: str) -> tuple[str, ...]:
        if folder not in labels:
            raise UserError(f"the class {folder!r} of ObjectNet is not in {folders_file}")
        wanted = [name.strip() for name in translations.get(labels[folder], "").split(";") if name.strip()]
        for name in wanted:
            if (count := len(numbers.get(name, []))) != 1:
                raise UserError(
                    f"{translations_file}: {count} ImageNet classes are called {name!r} ({labels[folder]}), not one"
                )
        return tuple(numbered[numbers[name][0]] for name in wanted)

    return [classes(folder) for folder in folders]
