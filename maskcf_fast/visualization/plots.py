"""Pictures of a comparison: accuracy in against accuracy out of distribution, and counterfactual images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCES = {"zero-shot": "o", "FT": "s"}  # methods without a weight, and their markers
WISE = "WiSE-FT"
MARKERS = "^Dv<P>Xph*"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by everyone
MASKED = (230, 97, 1)  # the colour of a mask


class Point(NamedTuple):
    """Accuracies of one setting, in per cent, a value per seed; the label (weight, or WiSE-FT's α) is drawn."""

    label: str
    id_accuracy: Sequence[float]
    ood_accuracy: Sequence[float]


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _draw(axes: Axes, name: str, points: Sequence[Point], colour: str, marker: str, line: str) -> None:
    x = [float(np.mean(p.id_accuracy)) for p in points]
    y = [float(np.mean(p.ood_accuracy)) for p in points]
    size, z = (9, 4) if name in REFERENCES else (4, 3) if name.startswith(WISE) else (6, 3)
    axes.plot(x, y, linestyle=line, color=colour, marker=marker, markersize=size, label=name, zorder=z)
    dx, dy = [_spread(p.id_accuracy) for p in points], [_spread(p.ood_accuracy) for p in points]
    if any(dx + dy):
        axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.4, zorder=2)
    for point, at in zip(points, zip(x, y, strict=True), strict=True):
        if point.label:
            offset, side = ((-5, -9), "right") if name.startswith(WISE) else ((5, 4), "left")
            axes.annotate(
                point.label, at, offset, textcoords="offset points", ha=side, color=colour, fontsize=7.5, zorder=5
            )


def plot_tradeoff(path: Path, curves: Mapping[str, Sequence[Point]], title: str = "") -> None:
    """Draw ID accuracy (x) against OOD accuracy (y): one curve per method over its points, in their order.

    "zero-shot" and "FT" are drawn as large marks, "WiSE-FT" as a dashed line, and "WiSE-FT x" as one in the
    colour of the method x. Points are means over the
    seeds; with several seeds, error bars show one standard deviation.

    Args:
        path: Picture to write; its suffix chooses the format.
        curves: Points of each method, by name.
        title: Title of the picture.

    Raises:
        ValueError: There is no point to draw, or one without accuracies or with unequal numbers of them.
    """
    for name, points in curves.items():
        for label, ids, oods in points:
            if not len(ids) == len(oods) > 0:
                raise UserError(f"{name} {label}: {len(ids)} ID and {len(oods)} OOD accuracies, expected n of both")
    if not any(curves.values()):
        raise UserError("curves holds no point to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    tuned = [name for name in curves if name not in REFERENCES and not name.startswith(WISE)]
    for name, points in curves.items():
        if name in REFERENCES:
            _draw(axes, name, points, "black", REFERENCES[name], "none")
        elif name.startswith(WISE):
            of = name.removeprefix(WISE).strip()
            colour = COLOURS[tuned.index(of) % len(COLOURS)] if of in tuned else "0.45"
            _draw(axes, name, points, colour, ".", "--")
        else:
            i = tuned.index(name)
            _draw(axes, name, points, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], "-")
    axes.set(xlabel="ID accuracy (%)", ylabel="OOD accuracy (%)", title=title)
    axes.margins(0.08)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=150)


def _upsample(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Patch values ``[N, L]`` to pixels ``[N, S, S]``, without smoothing: a patch is what is masked."""
    n, grid = len(values), math.isqrt(values.shape[1])
    return values.reshape(n, grid, grid).repeat(size // grid, axis=1).repeat(size // grid, axis=2)


def heat_maps(images: ArrayLike, cams: ArrayLike) -> NDArray[np.uint8]:
    """The images in grey under their maps, from black (not relevant) to yellow (each image's most relevant patch).

    Args:
        images: uint8 ``[N, S, S, 3]``.
        cams: ``[N, L]`` of a square grid, not negative. A row with a NaN or an infinity is drawn as zeros.
    """
    from matplotlib import colormaps

    pixels, cam = np.asarray(images), np.asarray(cams, dtype=np.float64)
    cam = np.where(np.isfinite(cam).all(axis=1, keepdims=True), cam, 0)
    score = np.clip(cam / (cam.max(axis=1, keepdims=True) + 1e-8), 0, 1)
    heat = colormaps["inferno"](_upsample(score, pixels.shape[1]))[..., :3]
    grey = pixels.mean(axis=3, keepdims=True)
    return np.rint(0.4 * grey + 0.6 * 255 * heat).astype(np.uint8)


def kept_patches(images: ArrayLike, masks: ArrayLike) -> NDArray[np.uint8]:
    """The images ``[N, S, S, 3]`` (uint8) with the masked patches, of ``masks [N, L]`` (bool), in light grey."""
    pixels = np.asarray(images)
    hidden = _upsample(np.asarray(masks), pixels.shape[1])[..., None]
    return np.where(hidden, np.uint8(230), pixels)


def mask_maps(images: ArrayLike, masks: ArrayLike) -> NDArray[np.uint8]:
    """The images ``[N, S, S, 3]`` (uint8), paled, with the masked patches, of ``masks [N, L]`` (bool), in orange."""
    pixels = 0.45 * np.asarray(images) + 0.55 * 128
    hidden = _upsample(np.asarray(masks), pixels.shape[1])[..., None]
    orange = 0.25 * pixels + 0.75 * np.array(MASKED)
    return np.rint(np.where(hidden, orange, pixels)).astype(np.uint8)


def plot_counterfactuals(
    path: Path,
    images: ArrayLike,
    cams: ArrayLike,
    masks: ArrayLike,
    refilled: ArrayLike,
    *,
    grid: int,
    captions: Sequence[str] | None = None,
) -> None:
    """Draw a row per image: the original, its CAM laid over it, the patches kept, and the counterfactual.

    Args:
        path: Picture to write; its suffix chooses the format.
        images: ``[N, S, S, 3]``, uint8 or float in [0, 1].
        cams: ``[N, L]``, not negative; every image's is scaled to its own maximum.
        masks: ``[N, L]`` bool, True where a patch is replaced.
        refilled: The counterfactual images, like ``images``.
        grid: Patches along a side, ``L = grid²``; divides ``S``.
        captions: A caption per image, written beside its row.

    Raises:
        ValueError: Shapes do not fit each other, or ``images`` is empty.
    """
    originals, fills, cam, mask = (np.asarray(a) for a in (images, refilled, cams, masks))
    n, size = len(originals), originals.shape[1] if originals.ndim == 4 else 0
    for name, array, shape in (
        ("images", originals, (max(n, 1), size, size, 3)),
        ("refilled", fills, originals.shape),
        ("cams", cam, (n, grid * grid)),
        ("masks", mask, (n, grid * grid)),
    ):
        if array.shape != shape:
            raise UserError(f"{name} has shape {array.shape}, expected {shape}")
    if size % grid or (captions is not None and len(captions) != n):
        raise UserError(f"{n} images of side {size} fit neither grid={grid} nor captions={captions}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.6 * n + 0.3), layout="constrained")
    cells = figure.subplots(n, 4, squeeze=False)
    pixels, filled = (a if a.dtype == np.uint8 else np.rint(255 * a).astype(np.uint8) for a in (originals, fills))
    columns = (pixels, heat_maps(pixels, cam), kept_patches(pixels, mask.astype(bool)), filled)
    for i in range(n):
        for axes, pictures in zip(cells[i], columns, strict=True):
            axes.imshow(pictures[i], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        if captions is not None:
            cells[i][0].set_ylabel(captions[i], fontsize=8.5)
    for axes, heading in zip(cells[0], ("original", "relevance (CAM)", "patches kept", "counterfactual"), strict=True):
        axes.set_title(heading, fontsize=9.5)
    figure.savefig(path, dpi=150)
