"""Pictures of a comparison: accuracy in against accuracy out of distribution; images, their maps and masks."""

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


def draw_tradeoff(axes: Axes, curves: Mapping[str, Sequence[Point]]) -> None:
    """Draw ID accuracy (x) against OOD accuracy (y): one curve per method over its points, in their order.

    "zero-shot" and "FT" are drawn as large marks, "WiSE-FT" as a dashed line, and "WiSE-FT x" as one in the colour of
    the method x. Points are means over the seeds; with several seeds, error bars show one standard deviation.

    Args:
        axes: Where to draw.
        curves: Points of each method, by name.

    Raises:
        ValueError: There is no point to draw, or one without accuracies or with unequal numbers of them.
    """
    for name, points in curves.items():
        for label, ids, oods in points:
            if not len(ids) == len(oods) > 0:
                raise UserError(f"{name} {label}: {len(ids)} ID and {len(oods)} OOD accuracies, expected n of both")
    if not any(curves.values()):
        raise UserError("curves holds no point to draw")
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
    axes.set(xlabel="ID accuracy (%)", ylabel="OOD accuracy (%)")
    axes.margins(0.08)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)


def plot_tradeoff(path: Path, curves: Mapping[str, Sequence[Point]], title: str = "") -> None:
    """Write a picture of `draw_tradeoff`; the suffix of ``path`` chooses its format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    draw_tradeoff(axes, curves)
    axes.set_title(title)
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


def sheet(pictures: ArrayLike, gap: int) -> NDArray[np.uint8]:
    """Pictures, uint8 ``[rows, columns, S, S, 3]``, joined to ``[height, width, 3]``, ``gap`` white pixels apart."""
    cells = np.pad(np.asarray(pictures), [(0, 0)] * 2 + [(0, gap)] * 2 + [(0, 0)], constant_values=255)
    rows, columns, side = cells.shape[:3]
    joined = cells.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    return joined[: len(joined) - gap, : joined.shape[1] - gap]


def draw_sheet(axes: Axes, pictures: ArrayLike, headings: Sequence[str] = (), rows: Sequence[str] = ()) -> None:
    """Fill ``axes`` with pictures, uint8 ``[rows, columns, S, S, 3]``; names of columns above, of rows on the left."""
    size = np.shape(pictures)[2]
    gap = size // 16
    axes.imshow(sheet(pictures, gap), interpolation="nearest")
    axes.set_xticks([at * (size + gap) + size / 2 for at in range(len(headings))], headings)
    axes.set_yticks([at * (size + gap) + size / 2 for at in range(len(rows))], rows)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
