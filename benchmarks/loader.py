"""``python -m benchmarks.loader``: images per second of every way to load the same files.

Each way runs over the same images for a fixed time, after a first epoch that is not timed: workers have started, and
caches are full. `benchmarks.report` adds a step fed by the loader, against one on a batch that is there.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from maskcf_fast.core.command import command
from maskcf_fast.data import LoaderConfig, Manifest, build_loader, scan_images
from maskcf_fast.models import preset

from . import measure as m
from .tables import options, table, write
from .workload import Variant, Workload

STEPS = {"cpu": 3, "cuda": 16}  # per turn of the fed step; a GPU's are short, and a turn's first waits for its images
ROUNDS = (3, 9)
COUNT, THREADS = 512, 2


def write_photographs(folder: Path, count: int) -> None:
    """Write JPEGs of 500×375, mirrored crops of scikit-learn's two sample images, in two classes."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        width = int(rng.integers(300, 501))
        height = width * 3 // 4
        left, top = (int(rng.integers(room - side + 1)) for room, side in zip(photo.size, (width, height), strict=True))
        picture = photo.resize((500, 375), box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / str(i % len(photos)) / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)


def plain_loader(manifest: Manifest, config: LoaderConfig) -> Any:
    """What one writes without this package: files, torchvision's transforms, a `DataLoader`."""
    from PIL import Image
    from torchvision import transforms

    steps = [
        transforms.Resize(config.image_size, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(config.image_size),
        transforms.ToTensor(),
    ]
    transform = transforms.Compose(steps)

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(manifest)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            with Image.open(manifest.root / manifest.paths[i]) as image:
                return transform(image.convert("RGB")), manifest.labels[i]

    options: dict[str, Any] = {"num_workers": config.threads, "pin_memory": config.device != "cpu"}
    return torch.utils.data.DataLoader(Files(), config.batch_size, shuffle=True, drop_last=True, **options)


def rate(loader: Any, device: torch.device, seconds: float) -> float:
    """Images per second over whole epochs, for ``seconds`` and at least one, after one that is not counted."""

    def epoch() -> Iterator[int]:
        for images, labels, *_ in loader:
            images.to(device, non_blocking=True)
            yield len(labels)

    sum(epoch())
    m.synchronize(device)
    start, images = time.perf_counter(), 0
    while not images or time.perf_counter() - start < seconds:
        images += sum(epoch())
    m.synchronize(device)
    return images / (time.perf_counter() - start)


@contextmanager
def scanned(images: Path | None, count: int) -> Iterator[Manifest]:
    """The images of a folder of class folders or tar shards; of None, photographs that are there meanwhile."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, MASKCF_CACHE=f"{folder}/cache"):
        if images is None:
            images = Path(folder) / "images"
            write_photographs(images, count)
        yield scan_images(images)


def measure(
    device: torch.device, seconds: float, *, images: Path | None, batch: int, size: int, count: int, threads: int
) -> dict[str, Any]:
    """Images per second by way of loading, ``seconds`` for each; a string says why there is none."""
    with scanned(images, count) as manifest:
        settings = LoaderConfig(batch, size, train=True, threads=threads, device="cpu")
        here = replace(settings, device=str(device))
        ways: dict[str, Callable[[], Any]] = {"DALI, CPU": lambda: build_loader(manifest, settings, "dali")}
        if device.type == "cuda":
            ways["DALI, GPU"] = lambda: build_loader(manifest, here, "dali")
        ways["PIL in worker processes"] = lambda: build_loader(manifest, here, "torch")
        ways["cache: disk"] = lambda: build_loader(manifest, replace(here, cache="disk"))
        ways["cache: device"] = lambda: build_loader(manifest, replace(here, cache="device"))
        if manifest.spans is None:
            ways["plain torch DataLoader"] = lambda: plain_loader(manifest, here)
        rates: dict[str, float | str] = {}
        for name, build in ways.items():
            try:
                rates[name] = rate(build(), device, seconds)
            except ImportError as error:
                rates[name] = f"not available: {error}"
    facts = {"batch": batch, "size": size, "threads": threads, "images_per_second": rates}
    return {"environment": m.environment(device), "images": len(manifest)} | facts


def measure_with_step(
    device: torch.device, arch: str, seconds: float, *, images: Path | None, batch: int
) -> dict[str, Any]:
    """As `measure`, and ``fed``, what `fed_step` returns."""
    threads, size = max(torch.get_num_threads(), THREADS), preset(arch).image_size
    with scanned(images, STEPS[device.type] * batch) as manifest:
        settings = LoaderConfig(batch, size, train=True, threads=threads, device=str(device))
        fed = fed_step(build_loader(manifest, settings), Workload(preset(arch), batch, device), seconds / 2)
    ways = measure(device, seconds / 12, images=images, batch=batch, size=size, count=COUNT, threads=threads)
    return ways | {"fed": fed}


def fed_step(loader: Any, work: Workload, seconds: float) -> dict[str, Any]:
    """``fed_ms`` and ``synthetic_ms`` per step; ``slowdown``, the median over the rounds of their ratio, minus 1."""
    backward = work.backward(Variant("object-single", precision="bf16" if work.device.type == "cuda" else "fp32"))
    step, batch = work.step(backward), (work.images, work.labels)
    steps = min(STEPS[work.device.type], len(loader))

    def feed() -> None:
        for images, labels, _ in islice(loader, steps):
            work.images, work.labels = (x.to(work.device, non_blocking=True) for x in (images, labels))
            step()

    def synthetic() -> None:
        work.images, work.labels = batch
        for _ in range(steps):
            step()

    times = m.interleaved({"fed": feed, "synthetic": synthetic}, work.device, seconds=seconds, rounds=ROUNDS)
    found = {f"{name}_ms": m.summary(samples)["ms"] / steps for name, samples in times.items()}
    return {"batch": work.batch, "steps": steps} | found | {"slowdown": m.ratio(*times.values()) - 1}


def to_markdown(results: dict[str, Any]) -> str:
    """A table of what `measure` returns."""
    rates = results["images_per_second"]
    plain = rates.get("plain torch DataLoader")
    rows = [
        (name, value.partition(":")[0], "")
        if isinstance(value, str)
        else (name, f"{value:,.0f}", f"{value / plain:.2f} ×" if isinstance(plain, float) else "")
        for name, value in rates.items()
    ]
    env = results["environment"]
    lines = [
        *table(("loader", "images/s", "against a plain DataLoader"), rows, left=1),
        f"\n{results['images']:,} images → {results['size']}×{results['size']}, batches of {results['batch']}, "
        f"{results['threads']} threads or worker processes, {env['device']}, torch {env['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


@command()
def main(arguments: list[str]) -> None:
    given = options(
        "loader", __doc__, arguments, "device",
        images={"type": Path, "help": "folder of class folders or tar shards; by default photographs"},
        count={"type": int, "default": COUNT, "help": "photographs to write without --images"},
        batch={"type": int, "default": 64, "help": "images per batch"},
        size={"type": int, "default": 224, "help": "side of the images that come out"},
        threads={"type": int, "default": THREADS, "help": "decoding threads or worker processes"},
        seconds={"type": float, "default": 5.0, "help": "time for each way"},
        out={"type": Path, "help": "folder for loader.json and loader.md"},
    )  # fmt: skip
    settings = vars(given)
    out, device = settings.pop("out"), m.resolve_device(settings.pop("device"))
    results = measure(device, **settings)
    if out is None:
        print(to_markdown(results), end="")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write(results, to_markdown(results), out, "loader")


if __name__ == "__main__":
    sys.exit(main())
