"""Finds the images that are not usable, remembering the good ones between scans."""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..core.errors import UserError
from ..core.files import cache_dir
from ..core.tensors import DamagedFile, load_json, save_json
from .images import ImageError, ImageReader, read_image
from .manifest import Manifest, ellipsis

_CACHE_VERSION = 2  # to be raised whenever `read_image` becomes stricter
_TOGETHER = 16  # images that a thread takes at a time
Images = TypeVar("Images", bound=Manifest)


def verified(
    manifest: Images,
    on_bad_image: Literal["error", "skip"],
    *,
    bad: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Images:
    """The usable images of a manifest, each of which was decoded once; those that others are skipped for are named.

    Images that passed are remembered by path, size and time of change; later they are not decoded again.

    Args:
        manifest: The images.
        on_bad_image: Whether one that is not usable is an error, or left out and listed in ``skipped``.
        bad: Reasons why others are not usable, by path.
        workers: Threads that decode; one for each core by default.
        progress: Whether to show a progress bar on stderr.

    Raises:
        ValueError: An image is not usable and ``on_bad_image`` is "error".
    """
    return drop(manifest, on_bad_image, {**(bad or {}), **_find_bad(manifest, workers, progress)})


def drop(manifest: Images, on_bad_image: Literal["error", "skip"], bad: Mapping[str, str]) -> Images:
    """The manifest without ``bad`` images, or a ValueError that lists them by path and reason."""
    if on_bad_image not in ("error", "skip"):
        raise UserError(f'on_bad_image must be "error" or "skip", got {on_bad_image!r}')
    if bad and on_bad_image == "error":
        shown = "\n".join(f"  {path}: {reason}" for path, reason in itertools.islice(bad.items(), 5))
        raise UserError(
            f"{len(bad)} file(s) below {manifest.root} are not usable images:\n{shown}{ellipsis(bad)}\n"
            "Repair or remove them; --data.on-bad-image skip (of python -m maskcf_fast.evaluate: --on-bad-image skip) "
            "drops them."
        )
    kept = manifest.subset(i for i, path in enumerate(manifest.paths) if path not in bad)
    return replace(kept, skipped=(*manifest.skipped, *bad.items()))


def _find_bad(manifest: Manifest, workers: int | None, progress: bool) -> dict[str, str]:
    stamps = dict(zip(manifest.paths, manifest.stamps(), strict=True))
    known = _read_cache(manifest.root)
    good: dict[str, list[int] | None] = {
        path: stamp for path, stamp in stamps.items() if stamp is not None and known.get(path) == stamp
    }
    todo = [i for i, path in enumerate(manifest.paths) if path not in good]
    if not todo:
        return {}
    bad: dict[str, str] = {}
    from tqdm import tqdm

    reader = manifest.reader()
    parts = [todo[i : i + _TOGETHER] for i in range(0, len(todo), _TOGETHER)]
    # Threads: decoding lets go of Python's lock, and a process would run the caller's script again.
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        with warnings.catch_warnings(), tqdm(
            total=len(todo), desc="verifying images", unit="img", disable=not progress
        ) as bar:  # fmt: skip
            warnings.simplefilter("ignore")  # PIL warns about metadata that nobody reads
            for part, defects in zip(parts, pool.map(lambda part: _defects(reader, part), parts), strict=True):
                for i, defect in zip(part, defects, strict=True):
                    path = manifest.paths[i]
                    if defect:
                        bad[path] = defect
                    else:
                        good[path] = stamps[path]
                bar.update(len(part))
    finally:
        pool.shutdown(cancel_futures=True)
        # Also after Ctrl-C, which must not cost the minutes already spent. Bad files are not remembered: they
        # are few, and the reason may be gone the next time.
        _write_cache(manifest.root, good)
    return bad


def _defects(reader: ImageReader, indices: Sequence[int]) -> list[str]:
    return [_defect(reader, i) for i in indices]


def _defect(reader: ImageReader, index: int) -> str:
    """Why an image is not usable; empty if it is."""
    try:
        read_image(reader.bytes_of(index))
    except (ImageError, OSError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ""


def _cache_file(root: Path) -> Path:
    return cache_dir("manifests") / f"{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32]}.json"


def _read_cache(root: Path) -> dict[str, list[int]]:
    try:
        content: Any = load_json(_cache_file(root))
    except (OSError, DamagedFile):  # absent or damaged: verify again
        return {}
    return content["files"] if content["version"] == _CACHE_VERSION else {}


def _write_cache(root: Path, files: Mapping[str, list[int] | None]) -> None:
    content = {"version": _CACHE_VERSION, "root": str(root.absolute()), "files": files}
    try:
        save_json(_cache_file(root), content)
    except OSError as error:
        warnings.warn(f"the results of verifying {root} could not be kept for the next scan: {error}", stacklevel=5)
