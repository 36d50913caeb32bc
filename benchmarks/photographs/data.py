"""The benchmark's images: cut-outs of one class pasted on photographs of a kind that gives the class away.

Objects are divided into four splits: ``head`` (what the starting head is fitted on), ``train``, ``val`` (which chooses
epoch and weight) and ``test``; background photographs into those that are known from training and new ones. In
distribution are new objects on known photographs; the shifted sets have new objects on new photographs. Which object
and which photograph belongs where is drawn from the seed, so that several seeds tell how much that matters.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskcf_fast.core.errors import UserError
from maskcf_fast.core.files import read_json

from .sources import Packages, Photograph, families, sha256

FORMAT = 1  # of the folder; raise it when the same spec would give other pixels
TASKS: dict[str, dict[str, tuple[str, ...]]] = {  # class → kinds of background that it usually has
    "birds-mammals": {"bird": ("water", "sky", "stone"), "mammal": ("leaves", "trees")},
    "five-kinds": {
        "bird": ("sky",), "mammal": ("leaves",), "fruit": ("trees",), "flower": ("stone",), "vegetable": ("water",)
    },
}  # fmt: skip
OBJECT_SHARES = {"test": 0.3, "train": 0.35, "val": 0.15, "head": 0.2}
SCENE_SHARES = {"new": 0.4, "known": 0.6}
MANIFEST = "manifest.json"
SCENE_SIZE = 720  # of a photograph's shorter side, in pixels
BICUBIC = Image.Resampling.BICUBIC
T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """What the images of one seed are.

    Attributes:
        task: One of `TASKS`.
        seed: Of the splits and of everything else that is drawn.
        image_size: Side of the images as they are written, in pixels.
        train: Training images, over all classes.
        val: Validation images, over all classes.
        group: Test images of each class on its usual and on other backgrounds.
        head: Images of each class on each of the two.
        usual: Share of the training and validation images on their class's usual backgrounds.
        object_size: Range of the longer side of an object, as a share of the image's.
        crop: Range of the side of a background's crop, as a share of the photograph's shorter side.
        quality: Of the JPEG files.
    """

    task: str = "birds-mammals"
    seed: int = 0
    image_size: int = 224
    train: int = 192
    val: int = 96
    group: int = 60
    head: int = 40
    usual: float = 0.95
    object_size: tuple[float, float] = (0.4, 0.75)
    crop: tuple[float, float] = (0.4, 1.0)
    quality: int = 95


# Folder → split of its objects, whether its photographs are new, and how many images of each class lie on usual and on
# other backgrounds.
SETS: dict[str, tuple[str, bool, Callable[[Spec, int], tuple[int, int]]]] = {
    "head": ("head", False, lambda spec, n: (spec.head, spec.head)),
    "train": ("train", False, lambda spec, n: biased(spec.train // n, spec.usual)),
    "balanced": ("train", False, lambda spec, n: biased(spec.train // n, 1 / n)),
    "val": ("val", False, lambda spec, n: biased(spec.val // n, spec.usual)),
    "known-usual": ("test", False, lambda spec, n: (spec.group, 0)),
    "known-other": ("test", False, lambda spec, n: (0, spec.group)),
    "new-usual": ("test", True, lambda spec, n: (spec.group, 0)),
    "new-other": ("test", True, lambda spec, n: (0, spec.group)),
}
TESTS = ("known-usual", "known-other", "new-usual", "new-other")


def biased(n: int, usual: float) -> tuple[int, int]:
    """How many of ``n`` images lie on usual backgrounds, and how many on others."""
    return round(n * usual), n - round(n * usual)


def build(packages: Packages, root: Path, spec: Spec) -> Path:
    """Write the images of a spec, unless they are there already, and check that no source is in two splits.

    ``root`` then holds the folders of `SETS`, each with a folder per class; ``masks`` with a picture per image, white
    where the object is; and ``manifest.json`` with where everything comes from and its checksum.

    Raises:
        UserError: A package is missing, a class has too few objects, or ``root`` holds other or changed images.
    """
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
            new = Path(scratch, root.name)
            manifest = write(packages, new, spec)
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            try:
                new.rename(root)
            except OSError:  # another process was faster: its images are checked
                if not (root / MANIFEST).is_file():
                    raise
    check(root, spec)
    return root


def write(packages: Packages, root: Path, spec: Spec) -> dict[str, Any]:
    """Draw the splits and the images; what the manifest says of them."""
    usual = TASKS[spec.task]
    packages.require([kind for kinds in usual.values() for kind in kinds])
    rng = np.random.default_rng(spec.seed)
    objects = {label: divide(families(packages.objects(label)), OBJECT_SHARES, rng) for label in usual}
    scenes = {
        k: divide([[p] for p in packages.scenes(k)], SCENE_SHARES, rng) for kinds in usual.values() for k in kinds
    }
    images: dict[str, Any] = {}
    for folder, label, place in tqdm(list(plan(spec)), desc=f"{root.name}: images", leave=False):
        kinds = [k for name, kinds in usual.items() if (name == label) == place for k in kinds]
        split, new, _ = SETS[folder]
        kind = pick(kinds, rng)
        source, scene = pick(objects[label][split], rng), pick(scenes[kind]["new" if new else "known"], rng)
        name = f"{folder}/{label}/{len(images):05d}.jpg"
        files = (root / name, mask_of(root, name))
        for file, picture in zip(files, paste(source.path, scene.path, spec, rng), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file, quality=spec.quality)
        about = {"split": split, "object": source.name, "scene": scene.name, "kind": kind, "usual": place}
        images[name] = about | {"sha256": [sha256(file.read_bytes()) for file in files]}
    sources = {
        photograph.name: {
            "split": split, "kind": photograph.kind, "package": photograph.package, "licence": photograph.licence,
            "sha256": sha256(photograph.path.read_bytes()),
        }
        for parts in (*objects.values(), *scenes.values()) for split, group in parts.items() for photograph in group
    }  # fmt: skip
    return {"spec": described(spec), "checksum": checksum(images), "sources": sources, "images": images}


def check(root: Path, spec: Spec) -> dict[str, Any]:
    """The manifest of a folder, if it is of this spec, its files are the recorded ones and no source is in two splits.

    Raises:
        UserError: One of these is not so.
    """
    again = f"remove {root} to have it made again"
    if not (root / MANIFEST).is_file():
        raise UserError(f"{root} holds something else than this benchmark's images: choose another --out")
    manifest: dict[str, Any] = read_json(root / MANIFEST)
    if manifest["spec"] != described(spec):
        raise UserError(f"{root} holds images of other settings: {again}")
    for name, about in manifest["images"].items():
        found = [sha256(file.read_bytes()) if file.is_file() else "" for file in (root / name, mask_of(root, name))]
        if found != about["sha256"]:
            raise UserError(f"{root / name} or its mask is not what was written: {again}")
    if checksum(manifest["images"]) != manifest["checksum"]:
        raise UserError(f"{root / MANIFEST} is damaged: {again}")
    for role in ("object", "scene"):
        splits: dict[str, set[str]] = {}
        for name, about in manifest["images"].items():
            split, new, _ = SETS[name.split("/")[0]]
            splits.setdefault(about[role], set()).add(split if role == "object" else "new" if new else "known")
        if twice := [name for name, found in splits.items() if len(found) > 1]:
            raise UserError(f"{twice[0]} is in several splits, {', '.join(sorted(splits[twice[0]]))}: {again}")
    return manifest


def divide(
    groups: Sequence[list[Photograph]], shares: dict[str, float], rng: np.random.Generator
) -> dict[str, list[Photograph]]:
    """Photographs by split, each group in one of them, in about these shares; each split has at least one.

    Raises:
        UserError: Fewer groups than splits.
    """
    if len(groups) < len(shares):
        what = f"{len(groups)} {groups[0][0].kind}s" if groups else "no photographs of a class"
        raise UserError(f"{what} do not divide into {', '.join(shares)}: are the packages whole?")
    order = [groups[i] for i in rng.permutation(len(groups))]
    ends = np.rint(np.cumsum([*shares.values()]) * len(order)).astype(int)
    for i in range(len(ends)):  # at least one each, also of those that follow
        least = (ends[i - 1] if i else 0) + 1
        ends[i] = min(max(ends[i], least), len(order) - (len(ends) - 1 - i))
    parts = zip(shares, [0, *ends[:-1]], ends, strict=True)
    return {split: [p for group in order[start:end] for p in group] for split, start, end in parts}


def plan(spec: Spec) -> Iterator[tuple[str, str, bool]]:
    """Folder, class and whether the background is usual, of every image."""
    labels = TASKS[spec.task]
    for folder, (_, _, count) in SETS.items():
        for label in labels:
            for place, n in zip((True, False), count(spec, len(labels)), strict=True):
                yield from [(folder, label, place)] * n


def paste(source: Path, scene: Path, spec: Spec, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """An object at a random size and place, mirrored or not, on a random crop of a photograph; and its mask."""
    size = spec.image_size
    photograph = _scene(scene)
    side = int(min(photograph.size) * rng.uniform(*spec.crop))
    left, top = (int(rng.integers(room - side + 1)) for room in photograph.size)
    image = photograph.resize((size, size), BICUBIC, box=(left, top, left + side, top + side))
    cut = _stamp(source)
    scale = size * rng.uniform(*spec.object_size) / max(cut.size)
    cut = cut.resize([max(1, round(x * scale)) for x in cut.size], BICUBIC)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (int(rng.integers(size - x + 1)) for x in cut.size)
    image.paste(cut, (left, top), cut)
    mask = Image.new("L", (size, size))
    mask.paste(cut.getchannel("A"), (left, top))
    return image, mask


@lru_cache(maxsize=64)
def _scene(path: Path) -> Image.Image:
    """A photograph, not larger than the images need it."""
    with Image.open(path) as photograph:
        scale = SCENE_SIZE / min(photograph.size)
        size = [round(x * min(1, scale)) for x in photograph.size]
        return photograph.convert("RGB").resize(size, BICUBIC)


@lru_cache(maxsize=256)
def _stamp(path: Path) -> Image.Image:
    """A cut-out, without the empty margin."""
    with Image.open(path) as stamp:
        cut = stamp.convert("RGBA")
    return cut.crop(cut.getchannel("A").getbbox())


def mask_of(root: Path, name: str) -> Path:
    """Where the mask of an image lies."""
    return root / "masks" / Path(name).with_suffix(".png")


def pick(items: Sequence[T], rng: np.random.Generator) -> T:
    """One of them, each as likely."""
    return items[int(rng.integers(len(items)))]


def described(spec: Spec) -> dict[str, Any]:
    """The spec as JSON gives it back."""
    described: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(spec)}))
    return described


def checksum(images: dict[str, Any]) -> str:
    """SHA-256, in hex, over the names and checksums of all images and masks."""
    return sha256(json.dumps([[name, images[name]["sha256"]] for name in sorted(images)]).encode())
