"""A look at a run: from its folder and some images to the page and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from ..core.errors import UserError
from ..core.files import atomic_write, check_writable
from ..core.processes import choose_device
from ..data.loader import MOST_SEED
from ..methods import METHODS, MaskStrategy, strategy_names
from ..methods.label_map import LabelMap
from ..models import ImageClassifier
from ..training.runs import Run, read_run
from ..visualization.draws import Draws
from ..visualization.images import Images, read_images
from ..visualization.maps import counterfactuals, explain_labels
from ..visualization.page import Page
from ..visualization.plots import draw_sheet, heat_maps, mask_maps

BATCH = 16


@dataclass(frozen=True)
class VisualizeConfig:
    """Look at what a fine-tuned model attends to, and at the counterfactual images that each strategy makes of it.

    Writes index.html, which opens in any browser and needs nothing else, and a picture of each image.
    """

    run: Path
    """Folder of a training run."""
    images: Path
    """Folder of images. Where folders are called after the model's classes, maps explain those, else the prediction."""
    out: Path | None = None
    """Folder for the page and the pictures; by default visualize/ in the run's."""
    count: int = 12
    """How many images, spread evenly over the folder."""
    strategies: tuple[str, ...] = strategy_names()
    """{object,context,random}-{single,multi,none}: which patches are masked, and what fills them. The run's own
    strategy has the run's settings, the others have the paper's."""
    weights: Literal["auto", "final", "best"] = "auto"
    """The model after the last epoch, or of the best one; auto is best where held-out images chose it, else final."""
    classes: str | None = None
    """Names of the model's outputs: a file with one per line, or "imagenet". By default the training folder's."""
    exif: bool | None = None
    """Turn images as the orientation in their EXIF or XMP data says; by default as the run did."""
    seed: int = 0
    """Of the donors and the random masks."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


def visualize(config: VisualizeConfig) -> list[Path]:
    """Write the page and the pictures.

    Returns:
        The files written, ``index.html`` first.

    Raises:
        FileNotFoundError, NotADirectoryError: No such run or folder of images.
        ImportError, ValueError: Settings, a run, class names or images that cannot be used.
    """
    for name in config.strategies:
        MaskStrategy.from_name(name)
    if not 0 <= config.seed <= MOST_SEED:
        raise UserError(f"--seed must be from 0 to {MOST_SEED}, got {config.seed}")
    if not config.strategies:
        raise UserError(f"--strategies names none: there are {', '.join(strategy_names())}")
    run = read_run(config.run, config.weights, config.classes)
    out = config.out or config.run / "visualize"
    check_writable(out)
    model = run.tuned()
    upright = run.config.data.exif if config.exif is None else config.exif
    images = read_images(config.images, run.classes, model.backbone.config.image_size, config.count, out, upright)
    strategies = [_strategy(name, run) for name in dict.fromkeys(config.strategies)]
    filled = [strategy.name for strategy in strategies if strategy.filling.other_images]
    if len(images.names) == 1 and filled:
        raise UserError(
            f"{filled[0]} takes patches of other images, and there is only one: raise --count, add images to "
            f"{config.images}, or choose --strategies object-none context-none random-none"
        )
    page = _page(run, model, images, strategies, config)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "index.html"]
    atomic_write(written[0], page.html().encode())
    written += _draw_pictures(page, out)
    return written


def _strategy(name: str, run: Run) -> MaskStrategy:
    method = run.config.method
    own = METHODS[method.name].masks and name == method.strategy
    return method.mask_strategy() if own else MaskStrategy.from_name(name)


def _page(
    run: Run, model: ImageClassifier, images: Images, strategies: Sequence[MaskStrategy], config: VisualizeConfig
) -> Page:
    device = choose_device(config.device)
    model = model.to(device)
    method, vit = run.config.method, model.backbone.config
    label_map = LabelMap(method.cam, method.cam_target, method.start_layer, vit)
    maps = [
        explain_labels(model, label_map, pixels.to(device), labels.to(device), run.config.precision)
        for pixels, labels in zip(images.pixels.split(BATCH), images.labels.split(BATCH), strict=True)
    ]
    return Page(
        title=f"Counterfactual images of {run.name}",
        facts={
            "model": f"{run.config.model.name or run.config.model.arch}, {run.weights.name}",
            "trained with": f"{method.name}, {method.strategy}" if METHODS[method.name].masks else method.name,
            "map": f"the fine-tuned model's {method.cam} for the label's {method.cam_target}",
        },
        images=images,
        classes=run.classes,
        cam=torch.cat([cam.cpu() for cam, _ in maps]),
        probabilities=torch.cat([shares.cpu() for _, shares in maps]),
        strategies=strategies,
        draws=Draws.draw(len(images.names), vit.num_patches, torch.Generator().manual_seed(config.seed)),
    )


def _draw_pictures(page: Page, out: Path) -> list[Path]:
    """A picture per image: the original and its map, then each strategy's mask and counterfactual image."""
    from matplotlib.figure import Figure

    pixels = page.images.pixels
    columns = [("original", pixels.numpy(), heat_maps(pixels, page.cam))]
    for strategy in page.strategies:
        mask, made = counterfactuals(strategy, pixels, page.cam, page.draws.of(strategy))
        columns.append((strategy.name, mask_maps(pixels, mask), made.numpy()))
    sheets = np.stack([np.stack(pictures, axis=1) for _, *pictures in columns], axis=2)  # [N, 2, columns, S, S, 3]
    written = []
    for i, name in enumerate(tqdm(page.images.names, desc="pictures", unit="img", leave=False)):
        figure = Figure(figsize=(1.5 * len(columns), 3.3), layout="constrained")
        draw_sheet(figure.subplots(), sheets[i], [heading for heading, *_ in columns])
        written.append(out / f"{i + 1:03d}-{Path(name).stem}.png")
        figure.savefig(written[-1], dpi=130)
    return written
