"""The list of images of a data set, and splitting it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from ..core.errors import UserError
from .images import ImageReader, read_file

Span = tuple[int, int]  # offset and size in bytes within a tar shard


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
        upright: Whether images are turned by the orientation that they state.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    spans: tuple[Span, ...] | None = None
    upright: bool = True

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of classes, paths, labels and ``upright``; the root may move without changing it."""
        digest = hashlib.sha256(b"" if self.upright else b"as stored")
        for column in (self.classes, self.paths, self.labels):
            # NUL cannot be part of a file name, so neither items nor columns can run into each other.
            digest.update("".join(f"{item}\0" for item in column).encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    def stamps(self) -> list[list[int] | None]:
        """What changes when an image does: its size and its file's time of change; None for an unreadable file."""
        if self.spans is None:
            return [_stamp(os.path.join(self.root, path)) for path in self.paths]
        shards = [shard_of(path) for path in self.paths]
        times = {shard: _stamp(os.path.join(self.root, shard)) for shard in dict.fromkeys(shards)}
        return [
            None if (stamp := times[shard]) is None else [*span, stamp[1]]
            for shard, span in zip(shards, self.spans, strict=True)
        ]

    def reader(self) -> ImageReader:
        """What reads the images."""
        return _Files(self.root, self.paths, self.spans, self.upright)

    def subset(self, indices: Iterable[int]) -> Self:
        """The images of these indices, in this order; the classes stay."""
        indices = [int(i) for i in indices]
        return replace(
            self,
            paths=tuple(self.paths[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            spans=self.spans and tuple(self.spans[i] for i in indices),
        )

    def with_images(self) -> Self:
        """Without the classes of which there is no image: a ``classes.txt`` may list some."""
        used = sorted(set(self.labels))
        index = {label: i for i, label in enumerate(used)}
        return replace(
            self,
            classes=tuple(self.classes[label] for label in used),
            labels=tuple(index[label] for label in self.labels),
        )

    def holdout(self, n: int, seed: int) -> tuple[Self, Self]:
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
        differences = [f"{what} {some(names)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
        if differences:
            raise UserError(
                f"{other.root} must have the class folders of {self.root}, but it {' and '.join(differences)}"
            )
        if self.classes != other.classes:  # possible only with a classes.txt
            raise UserError(
                f"{other.root} has the classes of {self.root} in another order: give it the same classes.txt"
            )


class _Files(ImageReader):
    """Images in files or tar shards."""

    def __init__(self, root: Path, paths: Sequence[str], spans: Sequence[Span] | None, upright: bool) -> None:
        self.root, self.upright = root, upright
        # As arrays: worker processes would copy a list of objects page by page as they touch it.
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.spans = None if spans is None else np.array(spans, dtype=np.int64)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def bytes_of(self, index: int) -> bytes:
        path = self.name(index)
        if self.spans is None:
            return read_file(path)
        offset, size = self.spans[index].tolist()
        return read_file(os.path.join(self.root, shard_of(os.fsdecode(self.paths[index]))), (offset, size))


def shard_of(path: str) -> str:
    """The tar shard of a path in one, which is what comes before the colon."""
    return path[: path.lower().index(".tar:") + 4]


def some(names: Iterable[str]) -> str:
    """The first names of many, for a message."""
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + ellipsis(listed)


def ellipsis(items: Sized) -> str:
    """How many more than five there are, if any."""
    return f" … and {len(items) - 5} more" if len(items) > 5 else ""


def _stamp(path: str) -> list[int] | None:
    try:
        stat = os.stat(path)
    except OSError:  # such as a dangling link
        return None
    return [stat.st_size, stat.st_mtime_ns]
