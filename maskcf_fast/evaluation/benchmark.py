"""A test set as a classifier sees it: images, and which of the classifier's outputs are right for each class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import read_yaml
from ..data import Manifest
from ..data.manifest import some


@dataclass(frozen=True)
class Benchmark:
    """One test set for one list of classes.

    Attributes:
        name: What it is called in tables.
        layout: How its files are laid out; a name in `layouts.LAYOUTS`.
        source: The images; their labels index ``source.classes``.
        targets: bool ``[source classes, outputs]``, the outputs that count as right.
        allowed: bool ``[outputs]``, the outputs that predictions are chosen from.
        border: Pixels to cut off at each side.
        notes: What a reader of the results should know, in sentences.
    """

    name: str
    layout: str
    source: Manifest
    targets: Tensor
    allowed: Tensor
    border: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """Classes that there are images of."""
        return len(set(self.source.labels))

    @property
    def restricted(self) -> bool:
        """Whether predictions are chosen from a part of the outputs."""
        return not bool(self.allowed.all())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything but the model that a result depends on.

        Files and images in tar shards count by path, size and time of change. Names and labels alone would not do: two
        test sets may have the same ones.
        """
        digest = hashlib.sha256(f"{self.source.root} {self.source.fingerprint} {self.border}".encode())
        digest.update(str(list(self.targets.shape)).encode() + self.targets.numpy().tobytes())
        digest.update(self.allowed.numpy().tobytes())
        for stamp in self.source.stamps():
            digest.update(f"{stamp}\0".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reader:
    """What is asked of every data set: the classes of the model, and what to do about images that do not fit.

    Attributes:
        classes: Names of the model's outputs, in their order.
        class_map: For data sets that call classes otherwise: the model's name, or names, of each.
        outside: Whether a class that the model does not know is an error, or its images are left out.
        on_bad_image: See `scan_images`.
        verify: See `scan_images`.
        progress: See `scan_images`.
        upright: See `scan_images`.
    """

    classes: tuple[str, ...]
    class_map: Mapping[str, tuple[str, ...]] | None = None
    outside: Literal["error", "skip"] = "error"
    on_bad_image: Literal["error", "skip"] = "error"
    verify: bool = True
    progress: bool = False
    upright: bool = True

    def benchmark(
        self,
        name: str,
        layout: str,
        source: Manifest,
        meanings: Sequence[tuple[str, ...]],
        *,
        restricted: bool,
        border: int = 0,
        notes: Sequence[str] = (),
    ) -> Benchmark:
        """Fit a data set to the model's classes.

        Args:
            name: What it is called in tables.
            layout: How its files are laid out.
            source: The images.
            meanings: For each of ``source.classes``, the model's classes that are right for it; for none the
                images are always left out.
            restricted: Whether predictions are chosen from the classes of the data set only.
            border: Pixels to cut off at each side.
            notes: What a reader of the results should know.

        Raises:
            ValueError: A class is not among the model's and ``outside`` is "error", or nothing is left.
        """
        columns = {known: i for i, known in enumerate(self.classes)}
        targets = torch.zeros(len(source.classes), len(self.classes), dtype=torch.bool)
        for row, meaning in zip(targets, meanings, strict=True):
            row[[columns[known] for known in meaning if known in columns]] = True
        found = targets.any(dim=1).tolist()
        unknown = [
            folder for folder, hit, meaning in zip(source.classes, found, meanings, strict=True) if meaning and not hit
        ]
        notes = list(notes)
        if unknown:
            what = (
                f"{len(unknown)} of {len(source.classes)} classes of {name} ({source.root}) are not among the model's "
                f"{len(self.classes)}"
            )
            if self.outside == "error":
                remedy = "--outside skip leaves their images out, --class-map FILE translates names"
                raise UserError(f"{what}: {some(unknown)}; {remedy}")
            notes.append(f"{what}: their images are left out.")
        kept = np.flatnonzero(np.asarray(found)[np.asarray(source.labels, dtype=np.int64)])
        if not len(kept):
            raise UserError(
                f"no image of {name} ({source.root}) is of a class that the model knows: its classes are "
                f"{some(source.classes)}, the model's {some(self.classes)}"
            )
        if len(kept) < len(source):
            source = source.subset(kept)
        source = replace(source, upright=self.upright)
        allowed = targets[sorted(set(source.labels))].any(dim=0) if restricted else torch.ones_like(targets[0])
        return Benchmark(name, layout, source, targets, allowed, border, tuple(notes))

    def translate(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The model's names for a data set's own."""
        return [(self.class_map or {}).get(name, (name,)) for name in names]


def read_class_map(path: Path) -> dict[str, tuple[str, ...]]:
    """A YAML or JSON file of ``{a data set's class: the model's class, or a list of them}``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no class map at {path}")
    content = read_yaml(path)
    meanings = {name: value if isinstance(value, list) else [value] for name, value in content.items()} if (
        isinstance(content, dict)
    ) else {}  # fmt: skip
    if not meanings or not all(isinstance(name, str) for names in meanings.values() for name in names):
        raise UserError(f"{path} must hold the model's class, or a list of them, for each class of the data set")
    return {name: tuple(names) for name, names in meanings.items()}
