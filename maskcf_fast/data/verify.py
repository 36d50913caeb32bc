"""Finds the files that are not usable images, remembering the good ones between scans."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from ..core.files import atomic_write, cache_dir
from .images import read_file

# The formats, and of each the PIL modes, that DALI decodes to the same RGB pixels as PIL. It has no GIF; it
# fails on 1-bit TIFF and on grey JPEG 2000 with alpha; it reads float and LAB images as something else.
_MODES = {
    "BMP": {"1", "L", "P", "RGB"},
    "JPEG": {"L", "RGB", "CMYK"},
    "JPEG2000": {"L", "RGB", "RGBA", "I;16"},
    "MPO": {"L", "RGB", "CMYK"},  # what PIL calls a JPEG with a preview behind it
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"},
    "PPM": {"1", "L", "RGB"},
    "TIFF": {"L", "P", "RGB", "RGBA", "CMYK", "I;16"},
    "WEBP": {"RGB", "RGBA"},
}
_CACHE_VERSION = 1  # to be raised whenever `_defect` becomes stricter
_SERIAL_LIMIT = 2_000  # below this many files, starting processes costs more than it saves


Span = tuple[int, int]  # offset and size in bytes within a tar shard


def image_file(root: Path, path: str, span: Span | None) -> str:
    """The file that holds an image: itself, or its tar shard, whose name is what comes before the colon."""
    return os.path.join(root, path if span is None else path[: path.index(".tar:") + 4])


def image_stamps(root: Path, paths: Sequence[str], spans: Sequence[Span] | None) -> list[list[int] | None]:
    """What changes when an image does: its size and its file's time of change; None for an unreadable file."""
    if spans is None:
        return [_stamp(os.path.join(root, path)) for path in paths]
    shards = [image_file(root, path, span) for path, span in zip(paths, spans, strict=True)]
    times = {shard: _stamp(shard) for shard in dict.fromkeys(shards)}
    return [
        None if (stamp := times[shard]) is None else [*span, stamp[1]]
        for shard, span in zip(shards, spans, strict=True)
    ]


def find_bad_images(
    root: Path, paths: list[str], spans: Sequence[Span] | None, workers: int | None, progress: bool
) -> dict[str, str]:
    """Return the reason for each of ``paths``, relative to ``root``, that is not a usable image."""
    stamps = dict(zip(paths, image_stamps(root, paths, spans), strict=True))
    where = dict(zip(paths, spans, strict=True)) if spans is not None else {}
    known = _read_cache(root)
    todo = [path for path in paths if stamps[path] is None or known.get(path) != stamps[path]]
    good = {path: stamps[path] for path in paths if path in known and known[path] == stamps[path]}
    if not todo:
        return {}
    bad: dict[str, str] = {}
    try:
        defects = _defects(root, todo, [where.get(path) for path in todo], workers)
        for path, defect in zip(todo, _progress(defects, len(todo), progress), strict=True):
            if defect:
                bad[path] = defect
            else:
                good[path] = stamps[path]
    finally:
        # Also after Ctrl-C, which must not cost the minutes already spent. Bad files are not remembered: they
        # are few, and the reason may be gone the next time.
        _write_cache(root, good)
    return bad


def _defects(root: Path, paths: list[str], spans: list[Span | None], workers: int | None) -> Iterator[str]:
    roots = [root] * len(paths)
    if len(paths) <= _SERIAL_LIMIT or workers == 1:
        yield from map(_defect, roots, paths, spans)
    else:
        # Not forked: the caller may have threads or a CUDA context.
        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
            yield from pool.map(_defect, roots, paths, spans, chunksize=64)


def _defect(root: Path, path: str, span: Span | None) -> str:
    """Return why ``path`` below ``root`` is not a usable image; empty if it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about metadata that nobody reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(read_file(image_file(root, path, span), span))) as image:
                if image.format not in _MODES:
                    return f"its format {image.format} is not supported ({', '.join(_MODES)} are)"
                if image.mode not in _MODES[image.format]:
                    return f"its mode {image.mode} is not supported for {image.format}"
                if image.format == "WEBP" and image.getexif():
                    return "WebP with EXIF data, which DALI cannot always parse"
                image.load()  # all of it: verify() does not notice a lost tail
    except Image.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # PIL lets anything through, from SyntaxError to struct.error
        return f"cannot be decoded: {error}"
    return ""


def _progress(items: Iterable[str], total: int, show: bool) -> Iterable[str]:
    if not show:
        return items
    from tqdm import tqdm

    return tqdm(items, total=total, desc="verifying images", unit="file")


def _stamp(path: str) -> list[int] | None:
    try:
        stat = os.stat(path)
    except OSError:  # such as a dangling link, which _defect then reports
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _cache_file(root: Path) -> Path:
    return cache_dir("manifests") / f"{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32]}.json"


def _read_cache(root: Path) -> dict[str, list[int]]:
    try:
        content = json.loads(_cache_file(root).read_bytes())
        return dict(content["files"]) if content["version"] == _CACHE_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):  # absent, unreadable or damaged: verify again
        return {}


def _write_cache(root: Path, files: dict[str, list[int] | None]) -> None:
    content = {"version": _CACHE_VERSION, "root": str(root.absolute()), "files": files}
    try:
        atomic_write(_cache_file(root), json.dumps(content).encode())
    except OSError as error:
        warnings.warn(f"the results of verifying {root} could not be kept for the next scan: {error}", stacklevel=4)
