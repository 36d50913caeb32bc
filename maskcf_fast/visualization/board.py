"""What a training run shows of itself: a few images as the method sees them, for TensorBoard."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Manifest
from ..data.transforms import resize_and_crop
from ..methods import CounterfactualDistiller, Method
from ..methods.label_map import LabelMap
from ..models import ImageClassifier
from .draws import Draws
from .maps import counterfactuals, explain_labels
from .plots import heat_maps, sheet

ROWS = 4
SIDE = 128  # smaller images are enlarged to at least this
GAP = 4  # white pixels between pictures


def board_images(manifest: Manifest, image_size: int, count: int = ROWS) -> tuple[Tensor, Tensor]:
    """A few images, spread over the manifest, to show in every epoch.

    Returns:
        uint8 ``[N, S, S, 3]`` and their labels, int64 ``[N]``, on the CPU.
    """
    count = min(count, len(manifest))
    few = manifest.subset([(2 * i + 1) * len(manifest) // (2 * count) for i in range(count)])
    reader = few.reader()
    pictures = [torch.from_numpy(resize_and_crop(reader.image(i), image_size)) for i in range(count)]
    return torch.stack(pictures), torch.tensor(few.labels)


def rows_for_board(method: Method, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """A row per image: the original, the map of it that the method cuts from, and the counterfactual image.

    Changes neither gradients nor any state but the generator's. A method without a strategy has no third picture;
    its map is the student's attention relevance for the label's logit.

    Args:
        method: What is trained.
        images: uint8 ``[N, S, S, 3]``, on the method's device; the first four are shown.
        labels: int64 ``[N]``.
        generator: Source of donors and random masks, on the CPU. Not the training's own: a run that is looked at must
            stay the same run.

    Returns:
        uint8 ``[height, width, 3]``, on the CPU.
    """
    images, labels = images[:ROWS], labels[:ROWS]
    distiller = method if isinstance(method, CounterfactualDistiller) else None
    vit = method.student.backbone.config
    label_map = LabelMap("relevance", "logit", 0, vit) if distiller is None else distiller.map
    source = distiller.teacher if distiller is not None and distiller.cam_source == "teacher" else method.student
    cam = explain_labels(cast(ImageClassifier, source), label_map, images, labels, method.precision)[0].cpu()
    images = images.cpu()
    columns = [images, torch.from_numpy(heat_maps(images.numpy(), cam.numpy()))]
    if distiller is not None:
        draws = Draws.draw(len(images), vit.num_patches, generator)
        columns.append(counterfactuals(distiller.strategy, images, cam, draws.of(distiller.strategy))[1])
    times = -(-SIDE // vit.image_size)
    cells = torch.stack(columns, dim=1)  # [N, columns, S, S, 3]
    cells = cells.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    return F.pad(torch.from_numpy(sheet(cells, GAP)), (0, 0, GAP, GAP, GAP, GAP), value=255)
