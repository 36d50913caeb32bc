"""``python -m benchmarks.loader``: images per second of every way to load the same files.

Each way runs over the same images for a fixed time, after a first epoch that is not timed: workers have started, and
caches are full.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maskcf_fast.core.files import atomic_write
from maskcf_fast.data import LoaderConfig, Manifest, build_loader, scan_images

from .measure import environment, resolve_device, synchronize


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
    """What one writes without this package: ``ImageFolder`` of torchvision, or the same on PIL."""
    from PIL import Image
    from torch.utils.data import DataLoader

    try:
        from torchvision import transforms
    except ImportError:
        from maskcf_fast.data.transforms import resize_and_crop

        def transform(image: Image.Image) -> torch.Tensor:
            return torch.from_numpy(resize_and_crop(image, config.image_size)).permute(2, 0, 1).float() / 255
    else:
        transform = transforms.Compose(
            [
                transforms.Resize(config.image_size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(config.image_size),
                transforms.ToTensor(),
            ]
        )

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(manifest)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            with Image.open(manifest.root / manifest.paths[i]) as image:
                return transform(image.convert("RGB")), manifest.labels[i]

    pinned = config.device != "cpu"
    return DataLoader(
        Files(), config.batch_size, shuffle=True, num_workers=config.threads, drop_last=True, pin_memory=pinned
    )


def rate(loader: Any, device: torch.device, seconds: float) -> float:
    """Images per second over whole epochs, at least ``seconds`` of them, after one that is not counted."""

    def epoch() -> Iterator[int]:
        for images, labels, *_ in loader:
            images.to(device, non_blocking=True)
            yield len(labels)

    sum(epoch())
    synchronize(device)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += sum(epoch())
    synchronize(device)
    return images / (time.perf_counter() - start)


def measure(config: Config) -> dict[str, Any]:
    """Images per second by way of loading; a string says why there is none."""
    device = resolve_device(config.device)
    with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder) / "cache"):
        images = config.images or Path(folder) / "images"
        if config.images is None:
            try:
                write_photographs(images, config.count)
            except ImportError as error:
                return {"environment": environment(device), "unavailable": f"{error}: pass --images DIR"}
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
        return {
            "environment": environment(device),
            "images": len(manifest),
            "batch": config.batch,
            "size": config.size,
            "threads": config.threads,
            "images_per_second": rates,
        }


class _cache_in:
    """Let the package's cache be a folder for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.before = os.environ.get("MASKCF_CACHE")
        os.environ["MASKCF_CACHE"] = str(self.folder)

    def __exit__(self, *_: object) -> None:
        del os.environ["MASKCF_CACHE"]
        if self.before is not None:
            os.environ["MASKCF_CACHE"] = self.before


def to_markdown(results: dict[str, Any]) -> str:
    """A table of what `measure` returns."""
    if "unavailable" in results:
        return f"Loader: not available ({results['unavailable']})\n"
    rates = results["images_per_second"]
    plain = rates.get("plain torch DataLoader")
    lines = ["| loader | images/s | against a plain DataLoader |", "|---|--:|--:|"]
    for name, value in rates.items():
        if isinstance(value, str):
            lines.append(f"| {name} | {value.partition(':')[0]} | |")
        else:
            ratio = f"{value / plain:.2f} ×" if isinstance(plain, float) else ""
            lines.append(f"| {name} | {value:,.0f} | {ratio} |")
    env = results["environment"]
    lines.append(
        f"\n{results['images']:,} images → {results['size']}×{results['size']}, batches of {results['batch']}, "
        f"{results['threads']} threads or worker processes, {env['device']}, torch {env['versions']['torch']}."
    )
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
        atomic_write(out / "loader.json", json.dumps(results, indent=1).encode())
        atomic_write(out / "loader.md", to_markdown(results).encode())


if __name__ == "__main__":
    main()
