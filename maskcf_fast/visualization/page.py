"""The page: one HTML file with images, maps, donors and the script that cuts and refills, and nothing from outside."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..methods import Fill, MaskStrategy
from .draws import Draws
from .images import Images
from .plots import MASKED, heat_maps


@dataclass(frozen=True)
class Page:
    """Some images, seen by a model, as a page.

    Attributes:
        title: Heading of the page.
        facts: Lines below it, by name.
        images: The images.
        classes: Names of the classes.
        cam: The map of each image, float32 ``[N, L]``.
        probabilities: Of the classes, ``[N, classes]``.
        strategies: What is shown, in this order.
        draws: Donors and noise.
    """

    title: str
    facts: Mapping[str, str]
    images: Images
    classes: Sequence[str]
    cam: Tensor
    probabilities: Tensor
    strategies: Sequence[MaskStrategy]
    draws: Draws

    def html(self) -> str:
        """The whole page."""
        folder = resources.files(__package__)
        parts = {
            "TITLE": html.escape(self.title),
            "STYLE": (folder / "page.css").read_text(encoding="utf-8"),
            "SCRIPT": (folder / "page.js").read_text(encoding="utf-8"),
            # "<" would let a file's name end the script element.
            "DATA": json.dumps(page_data(self), separators=(",", ":")).replace("<", "\\u003c"),
        }
        page = (folder / "page.html").read_text(encoding="utf-8")
        return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], page)


def page_data(page: Page) -> dict[str, Any]:
    """What the script works on. Arrays are base64 of little-endian float32, or uint16 for donors.

    Each image says what a patch of it is filled with, by fill: the number of the image that it comes from, or a
    picture that is filled everywhere; nothing where patches are left out.
    """
    pixels = page.images.pixels.numpy()
    grid = round(page.cam.shape[1] ** 0.5)
    fills = {strategy.fill: _filled(strategy.filling, page) for strategy in page.strategies}
    heats = heat_maps(pixels, page.cam)
    chosen = page.probabilities.argmax(dim=1).tolist()
    images = []
    for i, label in enumerate(page.images.labels.tolist()):
        images.append(
            {
                "name": page.images.names[i],
                "label": page.classes[label] if label >= 0 else None,
                "prediction": page.classes[chosen[i]],
                "probability": float(page.probabilities[i, chosen[i]]),
                "source": _picture(pixels[i]),
                "heat": _picture(heats[i]),
                "cam": _numbers(page.cam[i], "<f4"),
                "noise": _numbers(page.draws.noise[i], "<f4"),
                "fills": {name: each[i] for name, each in fills.items()},
            }
        )
    size = pixels.shape[1]
    return {
        "facts": dict(page.facts),
        "size": size,
        "grid": grid,
        "maskColour": f"rgb({MASKED[0]} {MASKED[1]} {MASKED[2]} / 0.75)",
        "strategies": [
            {"name": s.name, **asdict(s), "exactly": s.filling.dropped(0.5, grid * grid) is not None}
            for s in page.strategies
        ],
        "images": images,
    }


def _filled(fill: Fill, page: Page) -> list[dict[str, str]]:
    """What patches of each image are filled with."""
    n, patches = page.cam.shape
    donors = page.draws.donors[fill.name]
    if fill.leaves_out:
        return [{}] * n
    if donors is not None:
        each = donors if donors.ndim == 2 else donors[:, None].expand(n, patches)
        return [{"donors": _numbers(row, "<u2")} for row in each]
    everywhere = torch.ones(n, patches, dtype=torch.bool)
    filled = fill.pixels(page.images.pixels.permute(0, 3, 1, 2), everywhere, None).permute(0, 2, 3, 1)
    return [{"picture": _picture(image)} for image in filled.numpy()]


def _picture(pixels: np.ndarray) -> str:
    """An image as a data URI, without loss: patches are cut from it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _numbers(values: Tensor, kind: str) -> str:
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()
