"""The loader that decodes every image once: for the paper's transform, which gives the same pixels every time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..core.errors import UserError
from .disk_cache import DiskCache
from .loader import Decoded, EpochLoader, Indices

PREFETCH = 2  # batches that are gathered while the caller has one
MEMORY_SHARE = 0.8  # of what is free, that a device cache may take


class CachedLoader(EpochLoader):
    """Gathers batches from decoded pixels, on disk or in the device's memory. See :class:`~maskcf_fast.data.Loader`.

    It yields what the loader that it is made from would, and they continue from each other's states.

    Args:
        loader: Decodes the images; its settings say where to keep the pixels.

    Raises:
        LoadingError, OSError, ValueError: See `build_loader`.
    """

    def __init__(self, loader: EpochLoader) -> None:
        super().__init__(loader.manifest, loader.config)
        self.backend = loader.backend
        self._loader = loader
        self._labels = torch.tensor(self.manifest.labels, dtype=torch.int64)
        self._on_device: Tensor | None = None  # uint8 [N, S, S, 3], the images of this rank's share
        self._on_disk: DiskCache | None = None
        if self.config.cache == "device":
            self._labels = self._labels.to(self.device)
            self._on_device = self._decode_share()
        else:
            # PIL's pixels need not pass through the GPU on their way to the disk.
            on_cpu = self.backend == "torch" and self.device.type == "cuda"
            source = type(loader)(self.manifest, replace(self.config, device="cpu")) if on_cpu else loader
            self._on_disk = DiskCache(source)

    @property
    def decoder(self) -> str:
        return self._loader.decoder

    def settings(self) -> dict[str, Any]:
        return self._loader.settings()

    def decode(self, batches: Iterator[Indices]) -> Iterator[Decoded]:
        if self._on_device is not None:
            first = self.share.start
            for _, indices in batches:
                index = self._to_device(torch.tensor(indices, dtype=torch.int64))
                yield self._on_device.index_select(0, index - first), self._labels[index]
            return
        waiting: deque[Future[Decoded]] = deque()
        # Not in a with: a forgotten generator would then wait for the thread inside the garbage collector, which may
        # have come in that very thread. Without it the thread ends when the executor is collected.
        thread = ThreadPoolExecutor(1)
        for _, indices in batches:
            waiting.append(thread.submit(self._gather, indices))
            if len(waiting) > PREFETCH:
                yield self._on_its_way(waiting.popleft().result())
        while waiting:
            yield self._on_its_way(waiting.popleft().result())

    def _gather(self, indices: list[int]) -> Decoded:
        assert self._on_disk is not None
        size = self.config.image_size
        pinned = self.device.type == "cuda"
        images = torch.empty((len(indices), size, size, 3), dtype=torch.uint8, pin_memory=pinned)
        self._on_disk.gather(indices, images.numpy())
        return images, self._labels[indices]

    def _on_its_way(self, decoded: Decoded) -> Decoded:
        images, labels = decoded
        return self._to_device(images), self._to_device(labels)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        # From pinned memory, or the host would wait for the GPU. torch keeps the memory until the copy is done.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _decode_share(self) -> Tensor:
        size, n = self.config.image_size, len(self.share)
        needed, free = n * size * size * 3, free_memory(self.device)
        if needed > MEMORY_SHARE * free:
            raise UserError(
                f'cache="device": {n:,} images of {size}×{size} take {needed / 2**30:.2f} GiB, more than '
                f'{MEMORY_SHARE:.0%} of the {free / 2**30:.2f} GiB that are free on {self.device}: use cache="disk"'
            )
        pixels = torch.empty((n, size, size, 3), dtype=torch.uint8, device=self.device)
        step, first, done = self.config.batch_size, self.share.start, 0
        parts = ((0, list(self.share[i : i + step])) for i in range(0, n, step))
        with tqdm(total=n, desc="decoding", unit="img", delay=2, disable=self.config.rank > 0) as bar:
            for images, _ in self._loader.decoded(parts) if n else ():
                pixels[done : done + len(images)] = images
                done += len(images)
                bar.update(len(images))
        assert first + done == self.share.stop
        return pixels


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        [available] = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    return int(available) * 1024
