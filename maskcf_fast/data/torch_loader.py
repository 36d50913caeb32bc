"""The loader for wherever DALI is not installed: torch's DataLoader over PIL, with the same contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .loader import Batch, EpochLoader, LoaderConfig
from .manifest import Manifest
from .transforms import random_flip, random_resized_crop, resize_and_crop


class TorchLoader(EpochLoader):
    """Decodes with PIL in ``config.threads`` worker processes. See :class:`~maskcf_fast.data.Loader`.

    The order depends on (seed, epoch) and an image's augmentation on (seed, epoch, image) alone, so there is
    no state beyond the position, and the number of workers changes nothing.

    Args:
        manifest: The images.
        config: The settings.

    Raises:
        RuntimeError: The device is a GPU and there is none.
        ValueError: Fewer training images than one batch on each rank.
    """

    backend = "torch"

    def __init__(self, manifest: Manifest, config: LoaderConfig) -> None:
        super().__init__(manifest, config)
        self._images = _Images(manifest, config)
        self._batches: Iterator[list[Tensor]] | None = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._batches = None

    def _next(self) -> Batch:
        if self._batches is None:
            loader = DataLoader(
                self._images,
                batch_sampler=self._rest_of_epoch(),
                num_workers=self.config.threads,
                pin_memory=self.device.type == "cuda",
                # Of its own: the DataLoader would draw from the global one and so disturb the caller's.
                generator=torch.Generator(),
            )
            self._batches = iter(loader)
        images, labels = next(self._batches)
        return Batch(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))

    def _end_epoch(self) -> None:
        self._batches = None

    def _rest_of_epoch(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the (epoch, image index) pairs of each batch from the current position on."""
        if self.config.train:
            order = np.random.default_rng([self.config.seed, self._epoch]).permutation(len(self.manifest))
            used = self._length * self.config.batch_size * self.config.world_size
            mine = order[self.config.rank : used : self.config.world_size].tolist()
        else:
            mine = self._share
        # Read ahead of the position, so both are taken now.
        epoch, size = self._epoch, self.config.batch_size
        return ([(epoch, i) for i in mine[k : k + size]] for k in range(self._batch * size, len(mine), size))


class _Images(Dataset):
    """Map (epoch, index) to ``(pixels uint8 [S, S, 3], label)``."""

    def __init__(self, manifest: Manifest, config: LoaderConfig) -> None:
        self.root = manifest.root
        # As an array of bytes: worker processes would copy a list of strings page by page as they touch it.
        self.paths = np.array([path.encode(errors="surrogateescape") for path in manifest.paths], dtype=bytes)
        self.labels = np.array(manifest.labels, dtype=np.int64)
        self.config = config

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        path = self.root / self.paths[index].decode(errors="surrogateescape")
        size = self.config.image_size
        try:
            with Image.open(path) as image:
                if self.config.augment == "none":
                    pixels = resize_and_crop(image, size)
                else:
                    rng = np.random.default_rng([self.config.seed, epoch, index])
                    pixels = random_flip(random_resized_crop(image, size, rng), rng)
        except Exception as error:  # PIL lets anything through, from SyntaxError to struct.error
            raise RuntimeError(f"cannot decode {path}: {error}") from error
        return torch.from_numpy(pixels), int(self.labels[index])
