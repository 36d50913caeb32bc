"""``python -m benchmarks.loader``: images per second of every way to load the same files.

Each way runs over the same images for a fixed time, after a first epoch that is not timed: workers have started, and
caches are full. `benchmarks.report` adds a step fed by the loader, against one on a batch that is there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from maskcf_fast.data import LoaderConfig, Manifest, build_loader, scan_images
from maskcf_fast.models import preset

from . import measure as m
from .tables import table, write
from .workload import Variant, Workload

STEPS = {"cpu": 3, "cuda": 16}  # per turn of the fed step; a GPU's are short, and a turn's first waits for its images
ROUNDS = (3, 9)


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        images: Folder of class folders, or tar shards; None writes ``count`` photographs of 500×375.
        count: Photographs to write.
        batch: Images per batch.
        size: Side of the images that come out.
        threads: Decoding threads or worker processes.
        seconds: Time for each way.
        device: "cpu", "cuda", or "auto".
    """

    images: Path | None = None
    count: int = 512
    batch: int = 64
    size: int = 224
    threads: int = 2
    seconds: float = 5.0
    device: str = "auto"


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
    """Images per second over whole epochs, at least ``seconds`` of them, after one that is not counted."""

    def epoch() -> Iterator[int]:
        for images, labels, *_ in loader:
            images.to(device, non_blocking=True)
            yield len(labels)

    sum(epoch())
    m.synchronize(device)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += sum(epoch())
    m.synchronize(device)
    return images / (time.perf_counter() - start)


def measure(config: Config) -> dict[str, Any]:
    """Images per second by way of loading; a string says why there is none."""
    device = m.resolve_device(config.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, MASKCF_CACHE=str(Path(folder) / "cache")),
    ):
        images = config.images or Path(folder) / "images"
        if config.images is None:
            try:
                write_photographs(images, config.count)
            except ImportError as error:
                return {"environment": m.environment(device), "unavailable": f"{error}: pass --images DIR"}
        manifest = scan_images(images)
        settings = LoaderConfig(config.batch, config.size, train=True, threads=config.threads, device="cpu")
        here = replace(settings, device=str(device))
        ways: dict[str, Any] = {"DALI, CPU": lambda: build_loader(manifest, settings, "dali")}
        if device.type == "cuda":
            ways["DALI, GPU"] = lambda: build_loader(manifest, here, "dali")
        ways["PIL in worker processes"] = lambda: build_loader(manifest, here, "torch")
        for cache in ("disk", "device"):
            ways[f"cache: {cache}"] = lambda cache=cache: build_loader(manifest, replace(here, cache=cache))
        if manifest.spans is None:
            ways["plain torch DataLoader"] = lambda: plain_loader(manifest, here)
        rates: dict[str, float | str] = {}
        for name, build in ways.items():
            try:
                rates[name] = rate(build(), device, config.seconds)
            except ImportError as error:
                rates[name] = f"not available: {error}"
    facts = {"batch": config.batch, "size": config.size, "threads": config.threads, "images_per_second": rates}
    return {"environment": m.environment(device), "images": len(manifest)} | facts


def measure_with_step(config: Config, arch: str, seconds: float) -> dict[str, Any]:
    """As `measure`; ``fed`` is `fed_step`'s, or why there is none."""
    device = m.resolve_device(config.device)
    size = preset(arch).image_size
    found: dict[str, Any]
    try:
        with tempfile.TemporaryDirectory() as folder:
            images = config.images or Path(folder)
            if config.images is None:
                write_photographs(images, STEPS[device.type] * config.batch)
            settings = LoaderConfig(config.batch, size, train=True, threads=config.threads, device=str(device))
            loader = build_loader(scan_images(images), settings)
            fed = fed_step(loader, Workload(preset(arch), config.batch, device), seconds)
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        fed = {"not_measured": f"not available: {m.first_line(error)}"}
    try:
        found = measure(replace(config, size=size))
    except (RuntimeError, OSError, ValueError) as error:
        found = {"not_measured": m.first_line(error)}
    return found | {"fed": fed}


def fed_step(loader: Any, work: Workload, seconds: float) -> dict[str, Any]:
    """``fed_ms`` and ``synthetic_ms`` per step; ``slowdown``, the median over the rounds of their ratio, minus 1."""
    method = work.method(Variant("object-single", precision="bf16" if work.device.type == "cuda" else "fp32"))
    batch = [work.images, work.labels]
    step = work.step(lambda: method.backward(*batch, generator=work.generator))
    steps = min(STEPS[work.device.type], len(loader))
    fed: list[float] = []
    synthetic: list[float] = []
    end = time.perf_counter() + seconds

    def feed() -> None:
        for images, labels, _ in islice(loader, steps):
            batch[:] = images.to(work.device, non_blocking=True), labels.to(work.device, non_blocking=True)
            step()

    feed()  # workers start, kernels are tuned
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() > end:
            break
        fed.append(m.timed(feed, work.device) / steps)
        batch[:] = work.images, work.labels
        synthetic.append(m.timed(step, work.device, steps))
    times = {"fed_ms": 1e3 * statistics.median(fed), "synthetic_ms": 1e3 * statistics.median(synthetic)}
    return {"batch": work.batch, "steps": steps} | times | {"slowdown": m.ratio(fed, synthetic) - 1}


def to_markdown(results: dict[str, Any]) -> str:
    """A table of what `measure` returns."""
    if "unavailable" in results:
        return f"Loader: not available ({results['unavailable']})\n"
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of class folders or tar shards; by default photographs")
    parser.add_argument("--count", type=int, default=Config.count, help="photographs to write without --images")
    parser.add_argument("--batch", type=int, default=Config.batch, help="images per batch")
    parser.add_argument("--size", type=int, default=Config.size, help="side of the images that come out")
    parser.add_argument("--threads", type=int, default=Config.threads, help="decoding threads or worker processes")
    parser.add_argument("--seconds", type=float, default=Config.seconds, help="time for each way")
    parser.add_argument("--device", default=Config.device, help="cpu, cuda or auto")
    parser.add_argument("--out", type=Path, help="folder for loader.json and loader.md")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    try:
        results = measure(Config(**options))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(to_markdown(results), end="")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write(results, to_markdown(results), out, "loader")


if __name__ == "__main__":
    main()
