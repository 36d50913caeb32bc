"""Images in WebDataset tar shards: an index by offset, so that they shuffle and resume exactly like files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..core.errors import UserError
from ..core.files import atomic_write, cache_dir
from .images import read_file
from .manifest import Manifest, report_bad_images, scan_image_folder
from .verify import Span, find_bad_images

IMAGES = {"bmp", "jpg", "jpeg", "jp2", "j2k", "png", "pbm", "pgm", "ppm", "tif", "tiff", "webp"}
_INDEX_VERSION = 2  # to be raised whenever an index would hold something else
MOST_CLASSES = 10_000_000  # a higher number is taken for a slip
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Of one sample: its key, the name of its image, where that lies, and its class; an image or class may be missing.
Sample = tuple[str, str | None, Span | None, int | str | None]


def scan_images(
    source: str | os.PathLike[str],
    *,
    on_bad_image: Literal["error", "skip"] = "error",
    verify: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> Manifest:
    """List the images of a data set: of a folder per class, or of tar shards. See `scan_image_folder`.

    Args:
        source: A folder of class folders, or tar shards: a folder of ``.tar`` files, one such file, or a pattern
            such as ``shards/{000..009}.tar``.
        on_bad_image: See `scan_image_folder`.
        verify: See `scan_image_folder`.
        workers: See `scan_image_folder`.
        progress: See `scan_image_folder`.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: See `scan_image_folder` and `scan_tar_shards`.
    """
    options: dict[str, Any] = {
        "on_bad_image": on_bad_image, "verify": verify, "workers": workers, "progress": progress
    }  # fmt: skip
    source = Path(source)
    if source.is_dir():
        visible = [entry for entry in os.scandir(source) if entry.name[0] != "."]
        tars = any(entry.name.endswith(".tar") for entry in visible)
        folders = any(entry.is_dir() for entry in visible)
        return scan_tar_shards(source, **options) if tars and not folders else scan_image_folder(source, **options)
    shards = source.suffix == ".tar" or _BRACES.search(str(source))
    return scan_tar_shards(source, **options) if shards else scan_image_folder(source, **options)


def scan_tar_shards(
    source: str | os.PathLike[str],
    *,
    on_bad_image: Literal["error", "skip"] = "error",
    verify: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> Manifest:
    """List the images of WebDataset shards: uncompressed tar files of samples ``key.jpg`` + ``key.cls``.

    A sample's class is the text of its ``.cls``, or ``label`` in its ``.json``: an integer, or a name. Names of the
    classes come from ``classes.txt`` beside the shards, one per line in the order of the integers; without it they
    are the integers, or the names in sorted order. The index of a shard is remembered by its size and time of
    change, and images are verified like those of a folder.

    Args:
        source: A folder of ``.tar`` files, one such file, or a pattern such as ``shards/{000..009}.tar``.
        on_bad_image: Whether a broken image, or a sample without image or class, is an error or left out.
        verify: Whether to decode every new image once.
        workers: Processes that verify when there are more than 2,000 images to do; all cores by default.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The manifest, in the order of the shards; its paths are ``shard.tar:key.jpg``.

    Raises:
        FileNotFoundError: A shard does not exist.
        ValueError: A shard is not an uncompressed tar file, or is cut short; a class is not in ``classes.txt``; or
            an image is not usable and ``on_bad_image`` is "error".
    """
    shards = _expand(Path(source))
    root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
    named: list[tuple[str, Span, int | str]] = []
    bad: dict[str, str] = {}
    for shard in shards:
        shown = os.path.relpath(shard.absolute(), root)
        for key, name, span, label in _samples(shard):
            if name is None or span is None:
                bad[f"{shown}:{key}"] = f"no image ({', '.join(sorted(IMAGES))}) of this key"
            elif label is None:
                bad[f"{shown}:{name}"] = f'no class: neither {key}.cls nor "label" in {key}.json'
            else:
                named.append((f"{shown}:{name}", span, label))
    if not named:
        raise UserError(f"no images with a class in the tar shards {source}{': ' if bad else ''}{_first(bad)}")
    classes, labels = _classes(root, [label for *_, label in named], [path for path, *_ in named])
    paths, spans = [path for path, *_ in named], [span for _, span, _ in named]
    if verify:
        bad |= find_bad_images(root, paths, spans, workers, progress)
    report_bad_images(root, bad, on_bad_image)
    kept = [i for i, path in enumerate(paths) if path not in bad]
    if not kept:
        raise UserError(f"no usable image is left in the tar shards {source}: {_first(bad)}")
    return Manifest(root, classes, tuple(paths), labels, tuple(bad.items()), tuple(spans)).subset(kept)


def _first(bad: dict[str, str]) -> str:
    return next((f"{path}: {reason}" for path, reason in bad.items()), "")


def _expand(source: Path) -> list[Path]:
    """The shards of a folder, or of a pattern with ranges in braces."""
    if source.is_dir():
        return sorted(path for path in source.glob("*.tar") if path.name[0] != ".")
    parts = _BRACES.split(str(source))  # text, first, last, text, …
    ranges = [
        [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    if not all(ranges):
        raise UserError(f"{source} has an empty range: write the smaller number first")
    shards = [
        Path("".join(itertools.chain(*itertools.zip_longest(parts[::3], numbers, fillvalue=""))))
        for numbers in itertools.product(*ranges)
    ]
    if missing := [str(shard) for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(shards)} tar shard(s) are missing, first {missing[0]}")
    return shards


def _classes(root: Path, labels: list[int | str], paths: list[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of all classes, and each image's index into them."""
    file = root / "classes.txt"
    names = [line.strip() for line in file.read_text().splitlines() if line.strip()] if file.is_file() else None
    if names is not None and len(set(names)) < len(names):
        raise UserError(f"{file} names a class twice: {next(name for name in names if names.count(name) > 1)!r}")
    if names is None:
        kinds = {type(label) for label in labels}
        if len(kinds) > 1:
            raise UserError(f"the classes of {root} are partly integers, partly names: list the names in {file}")
        if kinds == {int}:
            for label, path in zip(labels, paths, strict=True):
                if not 0 <= int(label) <= MOST_CLASSES:
                    raise UserError(
                        f"{root / path} has a class outside 0 to {MOST_CLASSES} ({label}): classes count from 0"
                    )
            names = [str(i) for i in range(max(int(label) for label in labels) + 1)]
        else:
            names = sorted({str(label) for label in labels})
    index = {name: i for i, name in enumerate(names)}
    numbers = [label if isinstance(label, int) else index.get(label, -1) for label in labels]
    for number, label, path in zip(numbers, labels, paths, strict=True):
        if not 0 <= number < len(names):
            raise UserError(f"{root / path} has the class {label!r}, which is not one of the {len(names)} in {file}")
    return tuple(names), tuple(numbers)


def _samples(shard: Path) -> list[Sample]:
    """The samples of a shard in its order, read from its headers once and then from the cache."""
    stat = shard.stat()
    stamp = [_INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
    file = cache_dir("shards") / f"{hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:32]}.json"
    try:
        content = json.loads(file.read_bytes())
        if content["stamp"] == stamp:
            return [(key, name, span and (span[0], span[1]), label) for key, name, span, label in content["samples"]]
    except (OSError, ValueError, KeyError, TypeError):  # absent, unreadable or damaged: read the shard again
        pass
    samples = list(_read_shard(shard, stat.st_size))
    try:
        atomic_write(file, json.dumps({"stamp": stamp, "shard": str(shard), "samples": samples}).encode())
    except OSError as error:
        warnings.warn(f"the index of {shard} could not be kept for the next scan: {error}", stacklevel=3)
    return samples


def _read_shard(shard: Path, length: int) -> Iterator[Sample]:
    samples: dict[str, dict[str, tuple[str, Span]]] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = member.offset_data + (member.size + 511) // 512 * 512
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or name.startswith("."):
                    continue
                if member.offset_data + member.size > length:
                    raise UserError(f"{shard} is cut short within {member.name}: get it again")
                # As WebDataset has it: the key ends at the first dot of the file's name.
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                found = samples.setdefault(key, {})
                if extension.lower() in found:
                    raise UserError(f"{shard} holds {member.name} twice: repack it")
                found[extension.lower()] = (member.name, (member.offset_data, member.size))
        if not _ends(shard, end):  # tarfile takes a damaged header for the end
            raise UserError(f"{shard} is damaged or cut short at byte {end}: get it again")
    except tarfile.TarError as error:
        raise UserError(
            f"{shard} is no complete, uncompressed tar file ({error}): get it again, or repack it"
        ) from error
    for key, files in samples.items():
        images = [files[extension] for extension in files if extension.rpartition(".")[2] in IMAGES]
        if len(images) > 1:
            raise UserError(f"{shard}:{key} has several images ({', '.join(name for name, _ in images)}): keep one")
        yield key, *(images[0] if images else (None, None)), _label(str(shard), key, files)


def _ends(shard: Path, offset: int) -> bool:
    """Whether a tar file ends there: with two empty blocks of 512 bytes at least, and nothing after them."""
    with shard.open("rb") as file:
        file.seek(offset)
        length = 0
        while piece := file.read(1 << 20):
            if piece.strip(b"\0"):
                return False
            length += len(piece)
    return length >= 1024


def _label(shard: str, key: str, files: dict[str, tuple[str, Span]]) -> int | str | None:
    try:
        if "cls" in files:
            label = read_file(shard, files["cls"][1]).decode().strip()
        elif "json" in files:
            label = json.loads(read_file(shard, files["json"][1]))["label"]
        else:
            return None
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(label, str) and re.fullmatch(r"-?\d{1,9}", label):
        return int(label)
    return label if isinstance(label, str | int) and label != "" and not isinstance(label, bool) else None
