"""The images to look at: found in a folder, with their classes where the folders tell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import UserError
from ..data.images import ImageError, read_image
from ..data.scan import find_pictures
from ..data.transforms import resize_and_crop


@dataclass(frozen=True)
class Images:
    """Images as the model sees them.

    Attributes:
        names: Path of each, relative to the folder.
        pixels: uint8 ``[N, S, S, 3]``.
        labels: int64 ``[N]``, the class that its folder is called after, or -1.
    """

    names: tuple[str, ...]
    pixels: Tensor
    labels: Tensor


def read_images(
    root: Path, classes: Sequence[str], image_size: int, count: int, without: Path, upright: bool = True
) -> Images:
    """Read ``count`` images, spread evenly over the sorted files; what cannot be read is named and left out.

    Args:
        root: Folder, of class folders or of images of any depth; or one image.
        classes: Names of the model's classes.
        image_size: Side that the images are resized and cropped to.
        count: How many.
        without: Folder whose images are not meant: pictures of an earlier look may lie there.
        upright: As `read_image` takes it.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No image in it, or none that can be read, or ``count`` is below 1.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}")
    paths = find_pictures(root, without)
    root = root if root.is_dir() else root.parent
    count = min(count, len(paths))
    names, pixels, labels = [], [], []
    for path in (paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)):
        try:
            pixels.append(torch.from_numpy(resize_and_crop(read_image(path, upright), image_size)))
        except ImageError as error:
            print(f"skipped: {path}: {error}", file=sys.stderr)
            continue
        names.append(path.relative_to(root).as_posix())
        labels.append(_label(path, root, classes))
    if not pixels:
        raise UserError(f"none of the {count} images tried in {root} can be read")
    return Images(tuple(names), torch.stack(pixels), torch.tensor(labels))


def _label(path: Path, root: Path, classes: Sequence[str]) -> int:
    """Index of the class that the innermost of the image's folders, up to ``root`` itself, is called after, or -1."""
    folders = [root.resolve().name, *path.relative_to(root).parts[:-1]]
    return next((classes.index(name) for name in reversed(folders) if name in classes), -1)
