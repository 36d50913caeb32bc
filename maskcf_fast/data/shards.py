"""Images in WebDataset tar shards: an index by offset, so that they shuffle and resume exactly like files."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import posixpath
import re
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import UserError
from ..core.files import cache_dir, composed, decode_text, parse_json, read_lines
from ..core.tensors import DamagedFile, load_json, save_json
from .images import SUFFIXES, read_file
from .manifest import Manifest, Span

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
MOST_SHARDS = 1_000_000
MOST_CLASSES = 100_000  # that are numbered; a higher number is taken for a slip
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_INDEX_VERSION = 3  # to be raised whenever an index would hold something else
_LONGEST_LABEL = 2**24  # bytes of a .cls or .json
_BLOCK = 512
_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
# Of one sample: its key, the name of its image, where that lies, and its class; an image or class may be missing.
Sample = tuple[str, str | None, Span | None, int | str | None]
Member = tuple[str, Span]


def is_shards(source: Path) -> bool:
    """Whether a data set is tar shards: a file or pattern of them, or a folder of them that has no class folders."""
    if not source.is_dir():
        return source.name.lower().endswith((".tar", *COMPRESSED)) or _BRACES.search(str(source)) is not None
    visible = [entry for entry in os.scandir(source) if entry.name[0] != "."]
    return any(entry.name.lower().endswith(".tar") for entry in visible) and not any(map(is_folder, visible))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_shards(source: Path) -> tuple[Manifest, dict[str, str]]:
    """The images of shards, and why others are not usable, by path; see `scan_images`."""
    shards = _expand(source)
    root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
    named: list[tuple[str, Span, int | str]] = []
    bad: dict[str, str] = {}
    for shard in shards:
        shown = os.path.relpath(shard.absolute(), root)
        for key, name, span, label in _samples(shard):
            if name is None or span is None:
                bad[f"{shown}:{key}"] = f"no image ({', '.join(sorted(SUFFIXES))}) of this key"
            elif label is None:
                bad[f"{shown}:{name}"] = f'no class: neither {key}.cls nor "label" in {key}.json'
            else:
                named.append((f"{shown}:{name}", span, label))
    if not named:
        first = next((f": {path}: {reason}" for path, reason in bad.items()), "")
        raise UserError(f"no images with a class in the tar shards {source}{first}")
    paths, spans, labels = zip(*named, strict=True)
    classes, numbers = _classes(root, list(labels), list(paths))
    return Manifest(root, classes, paths, numbers, (), spans), bad


def _expand(source: Path) -> list[Path]:
    """The shards of a folder, or of a pattern with ranges in braces."""
    if source.is_dir():
        shards = sorted(path for path in source.iterdir() if path.suffix.lower() == ".tar" and path.name[0] != ".")
    else:
        parts = _BRACES.split(str(source))  # text, first, last, text, …
        bounds = [(int(first), int(last)) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
        count = math.prod(max(0, last - first + 1) for first, last in bounds)
        if not count:
            raise UserError(f"{source} has an empty range: write the smaller number first")
        if count > MOST_SHARDS:
            raise UserError(f"{source} stands for {count:,} shards: at most {MOST_SHARDS:,} are read")
        ranges = [
            [f"{i:0{len(text)}}" for i in range(first, last + 1)]
            for text, (first, last) in zip(parts[1::3], bounds, strict=True)
        ]
        shards = [
            Path("".join(itertools.chain(*itertools.zip_longest(parts[::3], numbers, fillvalue=""))))
            for numbers in itertools.product(*ranges)
        ]
    if missing := [str(shard) for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(shards)} tar shard(s) are missing or no files, first {missing[0]}: "
            "check the path; many are named {000..009}, or by their folder"
        )
    return shards


def _classes(root: Path, labels: list[int | str], paths: list[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of all classes, and each image's index into them."""
    file = root / "classes.txt"
    names = read_lines(file) if file.is_file() else []
    index = {name: i for i, name in enumerate(names)}
    if len(index) < len(names):
        raise UserError(f"{file} names a class twice: {next(name for name in names if names.count(name) > 1)!r}")
    # A name that is listed is one, even if it looks like a number.
    labels = [label if label in index else _number(label) for label in labels]
    if names and any(isinstance(label, int) for label in labels) and (gap := _gap(file)):
        raise UserError(f"{file} has nothing on line {gap}, and classes are numbers: remove the line if it is no class")
    if not names:
        kinds = {type(label) for label in labels}
        if len(kinds) > 1:
            raise UserError(f"the classes of {root} are partly integers, partly names: list the names in {file}")
        if kinds == {int}:
            for label, path in zip(labels, paths, strict=True):
                if not 0 <= int(label) <= MOST_CLASSES:
                    raise UserError(
                        f"{root / path} has a class outside 0 to {MOST_CLASSES} ({label}): classes count from 0; more "
                        f"need their names in {file}"
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


def _gap(file: Path) -> int | None:
    """The first line with nothing on it before the last that has something."""
    lines = decode_text(file.read_bytes(), file).rstrip().split("\n")
    return next((number for number, line in enumerate(lines, 1) if not line.strip()), None)


def _number(label: int | str) -> int | str:
    return int(label) if isinstance(label, str) and re.fullmatch(r"-?[0-9]{1,9}", label) else label


def _samples(shard: Path) -> list[Sample]:
    """The samples of a shard in its order, read from its headers once and then from the cache."""
    stat = shard.stat()
    stamp = [_INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
    name = f"{hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:32]}.json"
    try:
        content: Any = load_json(cache_dir("shards") / name)
        if content["stamp"] == stamp:
            return [(key, name, span and (span[0], span[1]), label) for key, name, span, label in content["samples"]]
    except (OSError, DamagedFile):  # absent or damaged: read the shard again
        pass
    samples = list(_read_shard(shard, stat.st_size))
    try:
        save_json(cache_dir("shards") / name, {"stamp": stamp, "shard": str(shard), "samples": samples})
    except OSError as error:
        warnings.warn(f"the index of {shard} could not be kept for the next scan: {error}", stacklevel=4)
    return samples


def _read_shard(shard: Path, length: int) -> Iterator[Sample]:
    samples: dict[str, dict[str, Member]] = {}  # by key and extension
    with shard.open("rb") as file:
        start = file.read(6)
        if kind := next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None):
            raise UserError(f"{shard} is compressed ({kind}), so that images cannot be read one by one: unpack it")
        for name, span in _members(shard, file, length):
            folder, _, base = name.rpartition("/")
            if base.startswith("."):
                continue
            # As WebDataset has it: the key ends at the first dot of the file's name.
            stem, _, extension = base.partition(".")
            found = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if extension.lower() in found:
                raise UserError(f"{shard} holds {name} twice: repack it")
            found[extension.lower()] = (name, span)
    for key, files in samples.items():
        images = [extension for extension in files if extension.rpartition(".")[2] in SUFFIXES]
        if not images:
            yield key, None, None, None
        for extension in images:
            name, span = files[extension]
            # Names with dots, such as 2024.05.01.jpg, fall under one key: then each has its class under its own name.
            own = extension.rpartition(".")[0] + "."
            labels = [f"{own}cls", f"{own}json"] if len(own) > 1 else []
            if len(images) == 1:
                labels += ["cls", "json"]
            elif not any(label in files for label in labels):
                shown = ", ".join(files[image][0] for image in images)
                raise UserError(
                    f"{shard}:{key} has several images ({shown}): keep one. A key ends at the first dot of the name, "
                    "so either use no other dots, or give each image a .cls of its own name"
                )
            yield key, name, span, next((_label(shard, files[label]) for label in labels if label in files), None)


def _members(shard: Path, file: BinaryIO, length: int) -> Iterator[Member]:
    """The files of a tar archive, or of several that were joined into one, and where their bytes lie."""
    start = 0
    where: dict[str, Span] = {}
    while start < length or not start:
        end = start
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    size = member.size if member.isreg() else 0
                    end = member.offset_data + -(-size // _BLOCK) * _BLOCK
                    if member.offset_data + size > length:
                        raise UserError(f"{shard} is cut short within {member.name}: get it again")
                    if member.issparse():
                        raise UserError(f"{shard} holds {member.name} as a sparse file: pack it without --sparse")
                    if member.isreg():
                        span = (member.offset_data, size)
                    elif member.islnk() or member.issym():  # a link to a file before it in the archive
                        folder = "" if member.islnk() else posixpath.dirname(member.name)
                        target = posixpath.normpath(posixpath.join(folder, member.linkname))
                        if target not in where:
                            continue
                        span = where[target]
                    else:
                        continue
                    where[posixpath.normpath(member.name)] = span
                    yield member.name, span
        except tarfile.TarError as error:
            if not start:
                raise UserError(f"{shard} is no tar file that can be read ({error}): get it again") from error
            end = start
        # tarfile takes a damaged header for the end. A true one is two empty blocks at least, and where another archive
        # was joined to this one, as many as fill a record.
        first, (zeros, start) = start, _zeros(file, end)
        if zeros < 2 * _BLOCK or (start < length and (start - first) % tarfile.RECORDSIZE):
            raise UserError(f"{shard} is damaged or cut short at byte {end}: get it again, or repack it")


def _zeros(file: BinaryIO, offset: int) -> tuple[int, int]:
    """How many empty bytes there are from an offset on, in whole blocks, and where they end."""
    file.seek(offset)
    at = offset
    while piece := file.read(1 << 20):
        rest = piece.lstrip(b"\0")
        at += len(piece) - len(rest)
        if rest:
            at -= (at - offset) % _BLOCK
            break
    return at - offset, at


def _label(shard: Path, member: Member) -> int | str | None:
    name, span = member
    if span[1] > _LONGEST_LABEL:
        return None
    data = read_file(shard, span)
    try:
        label = parse_json(data, name)["label"] if name.lower().endswith("json") else decode_text(data, name).strip()
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(label, str):
        label = composed(label.strip())
    return label if isinstance(label, str | int) and label != "" and not isinstance(label, bool) else None
