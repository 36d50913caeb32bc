"""The list of images of a data set: of a folder per class scanned, verified once, and split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from ..core.errors import UserError
from .verify import find_bad_images


@dataclass(frozen=True)
class Manifest:
    """The images of one data set, in a fixed order.

    Attributes:
        root: Folder that ``paths`` are relative to.
        classes: Names of the classes, of class folders sorted as strings; a label is an index into them.
        paths: Image files, with ``/`` between folders; in tar shards ``shard.tar:key.jpg``.
        labels: Class index of each image.
        skipped: (relative path, reason) of every file that was left out because it is not a usable image.
        spans: (offset, size) in bytes of each image within its tar shard; None where images are files.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    spans: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of classes, paths and labels; the root may move without changing it."""
        digest = hashlib.sha256()
        for column in (self.classes, self.paths, self.labels):
            # NUL cannot be part of a file name, so neither items nor columns can run into each other.
            digest.update("".join(f"{item}\0" for item in column).encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    def holdout(self, n: int, seed: int) -> tuple[Manifest, Manifest]:
        """Split off ``n`` images, from each class in proportion to its size.

        Shares are rounded by largest remainder (ties go to the lower label), so the count is exactly ``n``.

        Args:
            n: Number of images to hold out, at least 1 and fewer than there are.
            seed: Which images of a class are drawn; the same seed always gives the same split.

        Returns:
            ``(train, held_out)``, both in the order of this manifest.

        Raises:
            ValueError: ``n`` is out of range.
        """
        if not 0 < n < len(self):
            raise UserError(f"cannot hold out {n} of {len(self)} images: it must be between 1 and {len(self) - 1}")
        labels = np.asarray(self.labels)
        # Exact integers: share = n * size / len(self).
        share, remainder = np.divmod(n * np.bincount(labels, minlength=len(self.classes)), len(self))
        share[np.argsort(-remainder, kind="stable")[: n - share.sum()]] += 1
        held_out = np.zeros(len(self), dtype=bool)
        for label in range(len(self.classes)):
            members = np.flatnonzero(labels == label)
            held_out[np.random.default_rng([seed, label]).permutation(members)[: share[label]]] = True
        return self.subset(np.flatnonzero(~held_out)), self.subset(np.flatnonzero(held_out))

    def require_same_classes(self, other: Manifest) -> None:
        """Check that a label means the same class in both manifests.

        Raises:
            ValueError: The classes differ; names the ones that ``other`` lacks or has too many.
        """
        missing = sorted(set(self.classes) - set(other.classes))
        extra = sorted(set(other.classes) - set(self.classes))
        differences = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
        if differences:
            raise UserError(
                f"{other.root} must have the class folders of {self.root}, but it {' and '.join(differences)}"
            )
        if self.classes != other.classes:  # possible only with a classes.txt
            raise UserError(
                f"{other.root} has the classes of {self.root} in another order: give it the same classes.txt"
            )

    def subset(self, indices: Iterable[int]) -> Manifest:
        """The images of these indices, in this order; the classes stay."""
        indices = [int(i) for i in indices]
        return replace(
            self,
            paths=tuple(self.paths[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            spans=self.spans and tuple(self.spans[i] for i in indices),
        )


def scan_image_folder(
    root: str | os.PathLike[str],
    *,
    on_bad_image: Literal["error", "skip"] = "error",
    verify: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> Manifest:
    """List the images below ``root/<class>/``, after decoding each new or changed file once.

    A loader cannot skip a broken file in the middle of a run, so broken files are found here. Files that
    passed are remembered by path, size and time of change; a later scan does not decode them again. With
    several processes per machine, let one scan first: the others then find its results.

    Args:
        root: Folder with one sub-folder per class, of any depth. Hidden files and folders are ignored.
        on_bad_image: Whether a file that is not a usable image is an error, or left out and listed in
            ``skipped``. Usable is what both PIL and DALI decode in full: BMP, JPEG, JPEG 2000, PNG, PPM, TIFF
            and WebP in the common colour modes.
        verify: Whether to look into the files at all. Without it every file is taken for a usable image.
        workers: Processes that verify when there are more than 2,000 files to do; all cores by default.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The manifest, ordered by class and path.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        NotADirectoryError: ``root`` is a file.
        ValueError: ``root`` has no class folders, one of them is empty (or lost all its files by skipping), or
            a file is not a usable image and ``on_bad_image`` is "error".
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"there is no data set folder {root}: check the path")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file: pass the folder that has one sub-folder of images per class")
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."))
    if not classes:
        loose = any(entry.name[0] != "." for entry in os.scandir(root))
        why = "files lie in it directly" if loose else "it is empty"
        raise UserError(f"{root} has no class folders ({why}): put the images into one sub-folder per class")

    files = {name: sorted(_files_below(root / name, name)) for name in classes}
    if empty := [name for name in classes if not files[name]]:
        raise UserError(f"no images in the class folder(s) {_some(empty)} of {root}: fill or remove them")
    bad: dict[str, str] = {}
    if verify:
        bad = find_bad_images(root, [path for name in classes for path in files[name]], None, workers, progress)
    report_bad_images(root, bad, on_bad_image)
    kept = [(path, label) for label, name in enumerate(classes) for path in files[name] if path not in bad]
    if lost := [name for name in classes if all(path in bad for path in files[name])]:
        raise UserError(f"no usable image is left in the class folder(s) {_some(lost)} of {root}")
    return Manifest(
        root=root.absolute(),
        classes=classes,
        paths=tuple(path for path, _ in kept),
        labels=tuple(label for _, label in kept),
        skipped=tuple(bad.items()),
    )


def report_bad_images(root: Path, bad: dict[str, str], on_bad_image: str) -> None:
    """Raise a ValueError that lists unusable images by path and reason, unless they are to be skipped."""
    if on_bad_image not in ("error", "skip"):
        raise UserError(f'on_bad_image must be "error" or "skip", got {on_bad_image!r}')
    if bad and on_bad_image == "error":
        shown = "\n".join(f"  {path}: {reason}" for path, reason in list(bad.items())[:5])
        raise UserError(
            f"{len(bad)} file(s) below {root} are not usable images:\n{shown}{_ellipsis(bad)}\n"
            "Repair or remove them; --data.on-bad-image skip (of python -m maskcf_fast.evaluate: --on-bad-image skip) "
            "drops them."
        )


def _files_below(folder: Path, prefix: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(Path(entry.path), f"{prefix}/{entry.name}")
        else:
            yield f"{prefix}/{entry.name}"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + _ellipsis(names)


def _ellipsis(items: Sized) -> str:
    return f" … and {len(items) - 5} more" if len(items) > 5 else ""
