"""Finding the images of a data set, in folders of any depth or in tar shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..core.errors import UserError
from ..core.files import composed
from .images import SUFFIXES
from .manifest import Manifest, some
from .shards import COMPRESSED, is_folder, is_shards, list_shards
from .verify import drop, verified

LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}  # by systems, among the images


def scan_images(
    source: str | os.PathLike[str],
    *,
    on_bad_image: Literal["error", "skip"] = "error",
    verify: bool = True,
    upright: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> Manifest:
    """List the images of a data set: of a folder per class, or of tar shards.

    A loader cannot skip a broken image in the middle of a run, so broken ones are found here: each new or changed
    image is decoded once. Those that passed are remembered; with several processes per machine, let one scan first.

    Folders: one sub-folder per class, of any depth; links are followed. Hidden files and folders are ignored.

    Shards: uncompressed WebDataset tar files of samples ``key.jpg`` + ``key.cls``, or several joined in one. The class
    is the text of the ``.cls``, or ``label`` in a ``.json``: a name or an integer. Names of the classes come from
    ``classes.txt`` beside the shards, one per line in the order of the integers; without it they are the integers, or
    the names in sorted order.

    Args:
        source: A folder of class folders, or tar shards: a folder of ``.tar`` files, one such file, or a pattern
            such as ``shards/{000..009}.tar``.
        on_bad_image: Whether a file that is not a usable image, or a sample without image or class, is an error, or
            left out and listed in ``skipped``. Usable is what `read_image` reads: BMP, GIF, JPEG, JPEG 2000, PNG,
            PNM, TIFF and WebP, in all but the rarest colour modes.
        verify: Whether to look into the images at all. Without it every file is taken for a usable image.
        upright: Whether images are turned by the orientation that they state, as `read_image` does it.
        workers: Threads that verify; one for each core by default.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The manifest, ordered by class and path, or as the shards are.

    Raises:
        FileNotFoundError: ``source``, or one of its shards, does not exist.
        NotADirectoryError: ``source`` is a file, but no tar file.
        ValueError: There are no class folders or no images, a class has none (or lost all by skipping), a shard is
            compressed, damaged or cut short, a class is not in ``classes.txt``, or an image is not usable and
            ``on_bad_image`` is "error".
    """
    source = Path(source)
    shards = is_shards(source)
    listed, bad = list_shards(source) if shards else _list_folders(source)
    if verify:
        usable = verified(listed, on_bad_image, bad=bad, workers=workers, progress=progress)
    else:
        usable = drop(listed, on_bad_image, bad)
    left = set(usable.labels)
    lost = [] if shards else [name for label, name in enumerate(usable.classes) if label not in left]
    if lost or not left:
        where = f"the class folder(s) {some(lost)} of {source}" if lost else f"the tar shards {source}"
        raise UserError(f"no usable image is left in {where}: {': '.join(usable.skipped[0])}")
    return replace(usable, upright=upright)


def _list_folders(root: Path) -> tuple[Manifest, dict[str, str]]:
    if not root.exists():
        raise FileNotFoundError(f"there is no data set folder {root}: check the path")
    if not root.is_dir():
        raise NotADirectoryError(
            f"{root} is a file: pass the folder that has one sub-folder of images per class, or tar shards such as "
            f"{root.parent}/{{000..009}}.tar"
        )
    folders = class_folders(root)
    if not folders:
        names = [entry.name for entry in os.scandir(root) if entry.name[0] != "."]
        why = "files lie in it directly" if names else "it is empty"
        if any(name.lower().endswith(COMPRESSED) for name in names):
            raise UserError(
                f"the tar shards in {root} are compressed, so that images cannot be read one by one: unpack them"
            )
        raise UserError(f"{root} has no class folders ({why}): put the images into one sub-folder per class")
    classes = tuple(sorted({composed(name) for name in folders}))
    index = {name: label for label, name in enumerate(classes)}
    found = sorted((index[composed(name)], path) for name in folders for path in walk(root, name))
    if empty := sorted(set(classes) - {classes[label] for label, _ in found}):
        raise UserError(f"no images in the class folder(s) {some(empty)} of {root}: fill or remove them")
    manifest = Manifest(root.absolute(), classes, tuple(path for _, path in found), tuple(label for label, _ in found))
    return manifest, {}


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the visible folders in ``root``, sorted."""
    return tuple(sorted(entry.name for entry in os.scandir(root) if _visible(entry.name) and is_folder(entry)))


def walk(root: Path, folder: str = "") -> Iterator[str]:
    """Paths, relative to ``root``, of all visible files below ``root/folder``; every real folder is entered once."""
    seen = {_identity(root)} if folder else set()  # a link may lead back up
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        where = os.path.join(root, here)
        if (identity := _identity(where)) in seen:
            continue
        seen.add(identity)
        for entry in os.scandir(where):
            if _visible(entry.name):
                path = f"{here}/{entry.name}" if here else entry.name
                if is_folder(entry):
                    waiting.append(path)
                else:
                    yield path


def find_pictures(source: Path, without: Path | None = None) -> list[Path]:
    """Image files, told by their suffix, in a folder of any depth; or the one file that ``source`` is.

    Args:
        source: The folder or file.
        without: Folder whose images are not meant: pictures of an earlier run may lie there.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: There is no image.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no folder of images {source}: check --images")
    if not source.is_dir():
        return [source]
    outside = None if without is None else without.resolve()
    paths = sorted(source / path for path in walk(source) if path.rpartition(".")[2].lower() in SUFFIXES)
    paths = [path for path in paths if outside is None or outside not in path.resolve().parents]
    if not paths:
        raise UserError(f"there are no images in {source} (files ending in {', '.join(sorted(SUFFIXES))})")
    return paths


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in LEFT_BEHIND


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino
