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
from PIL import Image
from torch import Tensor

from ..methods import MaskStrategy
from .chance import Chance
from .images import Images
from .plots import MASKED, heat_maps


@dataclass(frozen=True)
class Look:
    """Some images, seen by a model.

    Attributes:
        title: Heading of the page.
        facts: Lines below it, by name.
        images: The images.
        classes: Names of the classes.
        cam: The map of each image, float32 ``[N, L]``.
        probabilities: Of the classes, ``[N, classes]``.
        strategies: What is shown, in this order.
        chance: Donors and noise.
    """

    title: str
    facts: Mapping[str, str]
    images: Images
    classes: Sequence[str]
    cam: Tensor
    probabilities: Tensor
    strategies: Sequence[MaskStrategy]
    chance: Chance


def render(look: Look) -> str:
    """The whole page."""
    folder = resources.files(__package__)
    parts = {
        "TITLE": html.escape(look.title),
        "STYLE": (folder / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (folder / "page.js").read_text(encoding="utf-8"),
        # "<" would let a file's name end the script element.
        "DATA": json.dumps(page_data(look), separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], page)


def page_data(look: Look) -> dict[str, Any]:
    """What the script works on. Arrays are base64 of little-endian float32, or uint16 for donors."""
    pixels = look.images.pixels.numpy()
    heats = heat_maps(pixels, look.cam)
    chosen = look.probabilities.argmax(dim=1).tolist()
    images = []
    for i, label in enumerate(look.images.labels.tolist()):
        images.append(
            {
                "name": look.images.names[i],
                "label": look.classes[label] if label >= 0 else None,
                "prediction": look.classes[chosen[i]],
                "probability": float(look.probabilities[i, chosen[i]]),
                "source": _picture(pixels[i]),
                "heat": _picture(heats[i]),
                "cam": _numbers(look.cam[i], "<f4"),
                "single": int(look.chance.single[i]),
                "multi": _numbers(look.chance.multi[i], "<u2"),
                "noise": _numbers(look.chance.noise[i], "<f4"),
            }
        )
    size = pixels.shape[1]
    return {
        "facts": dict(look.facts),
        "size": size,
        "grid": round(look.cam.shape[1] ** 0.5),
        "maskColour": f"rgb({MASKED[0]} {MASKED[1]} {MASKED[2]} / 0.75)",
        "strategies": [{"name": strategy.name, **asdict(strategy)} for strategy in look.strategies],
        "images": images,
    }


def _picture(pixels: np.ndarray) -> str:
    """An image as a data URI, without loss: patches are cut from it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _numbers(values: Tensor, kind: str) -> str:
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()
