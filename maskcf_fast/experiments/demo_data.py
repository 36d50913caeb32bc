"""A small data set with a spurious cue: real handwritten digits on cards, before tinted crops of real photographs.

The tint gives the class away in the training and ID test images and is independent of it in all others. A card covers
whole patches and carries no tint, so that object and cue share no patch. In the pre-training images all digits are
white, later half of them are black: what fine-tuning can honestly learn. All pixels come from what scikit-learn ships.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..core.errors import UserError

CLASSES = 10
TINTS = np.array([colorsys.hsv_to_rgb(c / CLASSES, 0.8, 1.0) for c in range(CLASSES)])  # [10, 3], one per class
SPLITS = ("pretrain", "train", "no_cue", "id_test", "ood_test")  # no_cue: like train, but for the cue
CUE = ("train", "id_test")  # where the tint tells the class
MARKER = "manifest.json"
BICUBIC = Image.Resampling.BICUBIC
FORMAT = 2  # of the folder; raise it when the same spec would give other pixels


@dataclass(frozen=True)
class DemoSpec:
    """What the demo data set consists of.

    Attributes:
        image_size: Side of the square images in pixels.
        card: Side of the card that a digit fills, in pixels.
        step: Cards lie at multiples of this many pixels: the model's patch size.
        counts: Images of each of the `SPLITS`.
        sources: Different digits that the pre-training, training and test images are made of; disjoint.
        bias: Share of the images with the cue whose tint is that of their class.
        tint: Weight of the tint against the photograph's own colours, in [0, 1].
        contrast: Range of the digits' opacity.
        noise: Standard deviation of the pixel noise.
        dark: Share of the digits that are written in black, but in the pre-training images; the others are white.
        crop: Range of the side of the photographs' crops, before they are resized.
        quality: JPEG quality.
        seed: Seed of everything drawn at random.
    """

    image_size: int = 48
    card: int = 16
    step: int = 8
    counts: tuple[int, int, int, int, int] = (5600, 1600, 1600, 1000, 1000)
    sources: tuple[int, int, int] = (700, 597, 500)
    bias: float = 0.98
    tint: float = 0.8
    contrast: tuple[float, float] = (0.7, 1.0)
    noise: float = 0.03
    dark: float = 0.5
    crop: tuple[int, int] = (48, 120)
    quality: int = 92
    seed: int = 0

    def __post_init__(self) -> None:
        if self.card > self.image_size or self.card % self.step or self.image_size % self.step:
            raise UserError(
                f"card={self.card} must be a multiple of step={self.step} and fit image_size={self.image_size}, another"
            )
        for name in ("bias", "tint", "dark"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if min(self.counts) < 1 or min(self.sources) < 1:
            raise UserError(f"counts and sources must be positive, got {self.counts} and {self.sources}")


@dataclass(frozen=True)
class DemoData:
    """Where the `SPLITS` lie, each a folder of class folders, and the checksum of their files."""

    root: Path
    checksum: str

    @property
    def tests(self) -> dict[str, Path]:
        """The test sets in and out of distribution, by name."""
        return {"id": self.root / "id_test", "ood": self.root / "ood_test"}


def _sources(spec: DemoSpec, split: str, total: int) -> NDArray[np.int64]:
    """Indices of the digits that a split is made of."""
    if sum(spec.sources) > total:
        raise UserError(f"sources={spec.sources} ask for more than the {total} digits there are")
    pretrain, train, test = np.split(
        np.random.default_rng(spec.seed).permutation(total)[: sum(spec.sources)], np.cumsum(spec.sources)[:2]
    )
    return {"pretrain": pretrain, "train": train, "no_cue": train}.get(split, test)


def _write_split(folder: Path, spec: DemoSpec, split: str, progress: bool) -> None:
    from sklearn.datasets import load_digits, load_sample_images

    digits, photos = load_digits(), [Image.fromarray(pixels) for pixels in load_sample_images().images]
    n, size = spec.counts[SPLITS.index(split)], spec.image_size
    rng = np.random.default_rng((spec.seed, 1 + SPLITS.index(split)))
    sources = np.resize(_sources(spec, split, len(digits.target)), n)
    labels = digits.target[sources]
    others = (labels + rng.integers(1, CLASSES, n)) % CLASSES
    tints = np.where(rng.random(n) < (spec.bias if split in CUE else 1 / CLASSES), labels, others)
    inks = rng.random(n) >= (0 if split == "pretrain" else spec.dark)  # False is black

    for label in range(CLASSES):
        (folder / f"digit_{label}").mkdir(parents=True)
    for i in tqdm(range(n), desc=split, disable=not progress):
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(spec.crop[0], spec.crop[1] + 1))
        left, top = (int(rng.integers(room - side + 1)) for room in photo.size)
        crop = photo.resize((size, size), BICUBIC, box=(left, top, left + side, top + side))
        photograph = np.asarray(crop, dtype=np.float64) / 255  # [S, S, 3]
        grey = photograph.mean(axis=2, keepdims=True)
        scene = (1 - spec.tint) * photograph + spec.tint * (0.25 + 0.75 * grey) * TINTS[tints[i]]

        row, column = spec.step * rng.integers((size - spec.card) // spec.step + 1, size=2)
        place = slice(row, row + spec.card), slice(column, column + spec.card)
        alpha = _enlarged(digits.images[sources[i]], spec.card) * rng.uniform(*spec.contrast)
        scene[place] = (1 - alpha) * (0.35 + 0.3 * grey[place]) + alpha * inks[i]
        pixels = np.rint((scene + rng.normal(0, spec.noise, scene.shape)).clip(0, 1) * 255).astype(np.uint8)
        path = folder / f"digit_{labels[i]}" / f"{i:05d}_source{sources[i]:04d}.jpg"
        # With fewer chroma samples the tint would run into the card.
        Image.fromarray(pixels).save(path, quality=spec.quality, subsampling=0)


def _enlarged(digit: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """An 8×8 digit of values 0 to 16, as ``[side, side, 1]`` in [0, 1]."""
    small = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((side, side), BICUBIC), dtype=np.float64)[..., None] / 255


def _checksum(root: Path) -> str:
    """SHA-256, in hex, over path and bytes of every file below ``root`` but the marker, sorted by path."""
    digest = hashlib.sha256()
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    for name in sorted(files.keys() - {MARKER}):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _finished_checksum(root: Path, spec: str) -> str | None:
    """The checksum of a finished, untouched data set of this spec under ``root``; None if there is none."""
    try:
        marker = json.loads((root / MARKER).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    checksum = _checksum(root)
    return checksum if marker == {"spec": spec, "checksum": checksum} else None


def build_demo_data(root: Path, *, spec: DemoSpec = DemoSpec(), progress: bool = False) -> DemoData:
    """Write the demo data set as JPEG files, one folder per class, unless it is there already.

    The same spec gives the same files, given the versions of numpy and Pillow. They are written to a temporary
    folder that is renamed when finished. A folder that is there already is reused if its spec and the bytes of
    all its files are the recorded ones, and otherwise built again.

    Args:
        root: Folder of the data set.
        spec: What to build.
        progress: Show a progress bar per split.

    Returns:
        The folders of the splits and the checksum over the relative paths and bytes of all image files.

    Raises:
        ValueError: The spec asks for too many digits, or ``root`` holds something else than a demo data set.
    """
    root = Path(root)
    described = json.dumps({"format": FORMAT, **asdict(spec)}, sort_keys=True)
    checksum = _finished_checksum(root, described)
    if checksum is None:
        foreign = sorted({p.name for p in root.iterdir()} - {*SPLITS, MARKER}) if root.exists() else []
        if foreign:
            raise UserError(f"{root} is not a demo data set and will not be replaced: it holds {foreign[:3]}")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            for split in SPLITS:
                _write_split(new / split, spec, split, progress)
            checksum = _checksum(new)
            (new / MARKER).write_text(json.dumps({"spec": described, "checksum": checksum}) + "\n")
            if root.exists():
                root.rename(old)
            try:
                new.rename(root)
            except OSError:  # another process was faster; its files are the same ones
                if _finished_checksum(root, described) != checksum:
                    raise
    return DemoData(root, checksum)
