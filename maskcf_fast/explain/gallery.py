"""Heat maps of a folder of pictures, one file each and all on one sheet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import check_writable
from ..core.processes import choose_device
from ..data.images import ImageError, read_image
from ..data.scan import find_pictures
from ..models.libraries import Classifier
from ..models.sources import load_classifier
from .models import check_explicable, explained, known_readout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHEET = 60  # pictures on the contact sheet at most


@dataclass(frozen=True)
class GalleryConfig:
    """Draw which patches a vision transformer's prediction rests on, for a folder of images."""

    model: str
    """timm:NAME, torchvision:NAME, open_clip:NAME/PRETRAINED or hf:ID_OR_DIR."""
    images: Path
    """Folder of images; subfolders are read too."""
    out: Path
    """Folder for the pictures: one per image, and gallery.png with all of them."""
    prompts: tuple[str, ...] = ()
    """Sentences that stand for the classes, for CLIP-like models."""
    label: int | None = None
    """Class to explain in all images; by default the predicted class of each."""
    start_layer: int = 0
    """First layer that counts; negative counts from the last."""
    pretrained: bool = True
    """Load the weights; --no-pretrained leaves them random (a test of the command)."""
    exif: bool = True
    """Turn images as the orientation in their EXIF or XMP data says."""
    batch_size: int = 16
    """Images explained at a time."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@dataclass(frozen=True)
class Picture:
    """One image and its map, on the CPU."""

    name: str
    pixels: Tensor  # [S, S, 3] in [0, 1]: what the model saw
    heat: Tensor  # [rows, columns]
    title: str


def draw_gallery(config: GalleryConfig) -> list[Path]:
    """Explain a folder of images and write the pictures.

    Returns:
        The files written, ``gallery.png`` last.

    Raises:
        ValueError: A bad setting, no readable image, or a model that cannot be loaded or explained.
    """
    if config.batch_size < 1:
        raise UserError(f"batch-size must be at least 1, got {config.batch_size}")
    if config.label is not None and not 0 <= config.label < 2**31:
        raise UserError(f"--label must be the number of a class, got {config.label}")
    check_writable(config.out)
    paths = find_pictures(config.images, without=config.out)
    device = choose_device(config.device)
    if config.pretrained:
        _try_without_weights(config)
    model = load_classifier(config.model, pretrained=config.pretrained, prompts=config.prompts, device=device)
    config.out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    sheet: list[Picture] = []
    for picture in _pictures(model, paths, config, device):
        written.append(config.out / f"{len(written):04d}-{picture.name}.png")
        _save([picture], written[-1], columns=1)
        sheet += [picture] if len(sheet) < SHEET else []
    if not written:
        raise UserError(f"none of the {len(paths)} images in {config.images} can be read")
    written.append(config.out / "gallery.png")
    _save(sheet, written[-1], columns=min(3, len(sheet)))
    return written


def _try_without_weights(config: GalleryConfig) -> None:
    """Refuse a model that cannot be explained before its weights are downloaded: its layers run without values."""
    meta = torch.device("meta")
    logging.disable(logging.WARNING)  # of libraries: that there are no weights
    try:
        with meta:
            model = load_classifier(config.model, pretrained=False, prompts=config.prompts, device=meta)
        from PIL import Image  # not before data, which says how to install it

        images = model.transform(Image.new("RGB", (64, 64)))[None].to(meta)
    except Exception:  # the true one will say, or it does not go without values
        return
    finally:
        logging.disable(logging.NOTSET)
    try:
        check_explicable(model.logits, images)
    except UserError as error:
        raise UserError(f"{config.model} cannot be explained: {error}") from error
    except Exception:  # an operation that needs values
        return


def _pictures(model: Classifier, paths: list[Path], config: GalleryConfig, device: torch.device) -> Iterator[Picture]:
    """Explained images; those that cannot be read are named and left out."""
    unread = 0
    for at in range(0, len(paths), config.batch_size):
        batch: list[tuple[Path, Tensor]] = []
        for path in paths[at : at + config.batch_size]:
            try:
                batch.append((path, model.transform(read_image(path, config.exif))))
            except ImageError as error:
                unread += 1
                print(f"skipped: {path}: {error}", file=sys.stderr)
        if batch:
            yield from _explain(model, batch, config, device)
    if unread:
        print(f"{unread} of {len(paths)} images could not be read", file=sys.stderr)


def _explain(
    model: Classifier, batch: list[tuple[Path, Tensor]], config: GalleryConfig, device: torch.device
) -> Iterator[Picture]:
    images = torch.stack([image for _, image in batch]).to(device)
    labels = None if config.label is None else torch.full((len(batch),), config.label, device=device)
    cam, logits, grid = explained(model.logits, images, labels, config.start_layer, readout=known_readout(model.module))
    if grid is None:
        raise UserError(f"how the {cam.shape[1]} patches lie in the image is not known")
    labels = logits.argmax(dim=1) if labels is None else labels
    shares = logits.float().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.mean, model.std))
    for (path, image), heat, label, share in zip(batch, cam, labels.tolist(), shares.tolist(), strict=True):
        pixels = (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)
        title = f"{model.classes.get(label, f'class {label}').partition(',')[0][:40]} ({share:.0%})"
        if not bool(heat.max() > 0):
            title += ": no relevance"
        yield Picture(path.stem, pixels, heat.unflatten(0, grid).cpu(), title)


def _save(pictures: list[Picture], path: Path, *, columns: int) -> None:
    """Every image beside itself under its heat map, ``columns`` pairs in a row."""
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.55 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for index, picture in enumerate(pictures):
        plain, mapped = axes[2 * index], axes[2 * index + 1]
        plain.imshow(picture.pixels)
        plain.set_title(picture.name[:24], fontsize=8)
        mapped.set_title(picture.title, fontsize=8)
        _overlay(mapped, picture)
    figure.savefig(path, dpi=120)


def _overlay(axis: Axes, picture: Picture) -> None:
    """The image in grey under its map, from no relevance to the image's most relevant patch."""
    height, width = picture.pixels.shape[:2]
    axis.imshow(picture.pixels.mean(dim=2), cmap="gray", vmin=0, vmax=1)
    axis.imshow(
        picture.heat.clamp(min=0) / picture.heat.max().clamp(min=1e-12),
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.6,
        interpolation="bilinear",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
