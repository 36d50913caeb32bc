"""The loader for wherever DALI is not installed: torch's DataLoader over PIL, with the same contract."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.optional import need
from ..core.signals import outlast
from .images import ImageError
from .loader import Decoded, EpochLoader, Indices, LoaderConfig
from .manifest import Manifest
from .transforms import randaugment, random_flip, random_resized_crop, resize_and_crop


class TorchLoader(EpochLoader):
    """Decodes with PIL in ``config.threads`` worker processes. See :class:`~maskcf_fast.data.Loader`.

    An image's augmentation depends on (seed, epoch, image) alone, so there is no state beyond the position, and
    the number of workers changes nothing.

    Args:
        manifest: The images.
        config: The settings.

    Raises:
        MissingLibraryError: RandAugment is asked for, and torchvision is not installed.
        RuntimeError: The device is a GPU and there is none.
        ValueError: Fewer training images than one batch on each rank.
    """

    backend = "torch"

    def __init__(self, manifest: Manifest, config: LoaderConfig) -> None:
        if config.augment == "randaugment":
            need("torchvision")
        super().__init__(manifest, config)

    @property
    def decoder(self) -> str:
        return f"PIL {PIL.__version__}"

    def decode(self, batches: Iterator[Indices]) -> Iterator[Decoded]:
        loader = DataLoader(
            _Images(self.manifest, self.config),
            batch_sampler=([(epoch, i) for i in indices] for epoch, indices in batches),
            num_workers=self.config.threads,
            worker_init_fn=outlast,
            pin_memory=self.device.type == "cuda",
            # Of its own: the DataLoader would draw from the global one and so disturb the caller's.
            generator=torch.Generator(),
        )
        try:
            for images, labels in start_workers(loader):
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except ImageError as error:
            # A worker process sends its whole traceback, at whose end the text stands.
            raise ImageError(str(error).strip().rpartition(f"{ImageError.__name__}: ")[2]) from error


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """``iter(loader)``, such that its worker processes leave this process's garbage alone.

    A forgotten DALI pipeline in it would wait in them for its threads, which a fork does not take along.
    """
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


class _Images(Dataset):
    """Map (epoch, index) to ``(pixels uint8 [S, S, 3], label)``."""

    def __init__(self, manifest: Manifest, config: LoaderConfig) -> None:
        self.reader, self.config = manifest.reader(), config
        # As an array: worker processes would copy a list of objects page by page as they touch it.
        self.labels = np.array(manifest.labels, dtype=np.int64)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        size = self.config.image_size
        image = self.reader.image(index, self.config.border)
        if self.config.augment == "none":
            pixels = resize_and_crop(image, size)
        else:
            rng = np.random.default_rng([self.config.seed, epoch, index])
            pixels = random_flip(random_resized_crop(image, size, rng), rng)
            pixels = randaugment(pixels, rng) if self.config.augment == "randaugment" else pixels
        return torch.from_numpy(pixels), int(self.labels[index])
