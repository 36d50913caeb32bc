"""Images whose colour says what a stub of a classifier answers, and trees of them in the published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tars import write_tar
from torch import nn

SIZE = 16  # of the images, so that none is resized


class ByColour(nn.Module):
    """Answers what the top left pixel says: red and green give the best class, blue the second best.

    Args:
        outputs: Number of outputs.
        seconds: Classes that blue chooses from; 0 stands for none of them.
    """

    def __init__(self, outputs: int, seconds: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.backbone = SimpleNamespace(config=SimpleNamespace(image_size=SIZE))
        self.outputs, self.seconds = outputs, seconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, green, blue = (images[:, 0, 0].long() // 8).unbind(1)
        logits = torch.zeros(len(images), self.outputs)
        for i, second in enumerate(self.seconds, 1):
            logits[blue == i, second] = 2
        logits[torch.arange(len(images)), red + 32 * green] = 3
        return logits


def colour(best: int, second: int = 0) -> tuple[int, int, int]:
    """The colour for which `ByColour` answers class ``best``, then its ``second``-th of ``seconds``."""
    return best % 32 * 8 + 4, best // 32 * 8 + 4, second * 8 + 4


def write(path: Path, best: int, second: int = 0) -> None:
    """An image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), colour(best, second)).save(path)


def write_framed(path: Path, best: int, inside: int) -> None:
    """As in ObjectNet: a red frame of two pixels. Then one pixel of the colour of ``best``, and ``inside`` within."""
    pixels = np.empty((SIZE + 4, SIZE + 4, 3), dtype=np.uint8)
    pixels[:] = 255, 0, 0
    pixels[2:-2, 2:-2] = colour(best)
    pixels[3:-3, 3:-3] = colour(inside)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_tree(root: Path, answers: dict[str, list[int | tuple[int, int]]]) -> Path:
    """``root/<folder>/<i>.png`` for each answer (best, or best and second) in each folder."""
    for folder, bests in answers.items():
        for i, best in enumerate(bests):
            write(root / folder / f"{i}.png", *(best if isinstance(best, tuple) else (best,)))
    (root / "README.txt").write_text("as in the archives of R and A")
    return root


def write_shards(root: Path, tree: Path, label: Callable[[str], str] = str, shards: int = 2) -> str:
    """The images of a tree as tar shards 0.tar, 1.tar, …, each with ``label(folder)`` for its class; their pattern."""
    paths = [path for path in sorted(tree.glob("*/*")) if path.suffix in (".png", ".jpg")]
    for number in range(shards):
        files = {}
        for i, path in list(enumerate(paths))[number::shards]:
            files[f"{i:04}{path.suffix}"] = path.read_bytes()
            files[f"{i:04}.cls"] = label(path.parent.name).encode()
        write_tar(root / f"{number}.tar", files)
    return f"{root}/{{0..{shards - 1}}}.tar"


OBJECTNET = {"alarm_clock": "Alarm clock", "backpack": "Backpack", "drill": "Drill", "air_freshener": "Air freshener"}
TO_IMAGENET = {
    "Alarm clock": "analog clock; digital clock",
    "Backpack": "backpack, back pack, knapsack, packsack, rucksack, haversack",
    "Drill": "power drill",
}
NUMBERS = {"analog clock": 409, "digital clock": 530, TO_IMAGENET["Backpack"]: 414, "power drill": 740}


def write_objectnet(root: Path) -> Path:
    """ObjectNet in miniature, under its real names. Its list of ImageNet classes is in an order of its own."""
    inside = 1  # "goldfish", which no image shows
    for i, best in enumerate((409, 530, 414, 740)):  # two right, two of other classes
        write_framed(root / "images" / "alarm_clock" / f"{i}.png", best, inside)
    write_framed(root / "images" / "backpack" / "0.png", 414, inside)
    write_framed(root / "images" / "drill" / "0.png", 740, inside)
    write_framed(root / "images" / "air_freshener" / "0.png", 414, inside)  # no ImageNet class: not to be counted
    mappings = root / "mappings"
    mappings.mkdir()
    order = np.random.default_rng(0).permutation(1000)  # of 2012, whose line order[n] is class number n
    names = {number: name for name, number in NUMBERS.items()}
    lines = [""] * 1000
    for number, line in enumerate(order):
        lines[line] = names.get(number, f"class {number}")
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    for name, content in (
        ("folder_to_objectnet_label.json", OBJECTNET),
        ("objectnet_to_imagenet_1k.json", TO_IMAGENET),
        ("pytorch_to_imagenet_2012_id.json", {str(n): int(line) for n, line in enumerate(order)}),
    ):
        (mappings / name).write_text(json.dumps(content))
    return root
