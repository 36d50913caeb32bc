"""What a loader promises, and the part of it that does not depend on the backend."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import UserError
from ..core.schema import Range, conform
from .images import ImageError
from .manifest import Manifest, ellipsis

Augment = Literal["none", "crop-flip", "randaugment"]
MOST_THREADS = 512
MOST_SEED = 2**31 - 1
BOUNDS = {  # of a loader's settings: more is taken for a slip
    "batch_size": (1, 1_000_000), "image_size": (1, 10_000), "world_size": (1, 1_000_000), "threads": (0, MOST_THREADS),
    "border": (0, 1_000),
}  # fmt: skip


class Batch(NamedTuple):
    """Images and their classes, on the loader's device, and which images they are.

    Attributes:
        images: uint8 ``[N, S, S, 3]``, RGB in [0, 255].
        labels: int64 ``[N]``, indices into the manifest's classes.
        indices: int64 ``[N]``, indices into the manifest's images; on the CPU, so that reading them waits for nothing.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class LoaderConfig:
    """Settings of a loader.

    Attributes:
        batch_size: Images per batch on this rank.
        image_size: Side of the square images, in pixels.
        train: Whether to shuffle every epoch and to yield full batches only. Otherwise every image comes
            exactly once per epoch over all ranks, in the manifest's order.
        augment: "none" resizes the short side and crops the centre; "crop-flip", for training only, takes a
            random resized crop and mirrors half of the images; "randaugment" then also changes each by RandAugment
            (Cubuk et al., NeurIPS 2020): two operations of strength 9 of 30, as DALI and torchvision have them.
        seed: Of the order and the augmentation; from 0 to 2**31 - 1, the same on all ranks.
        rank: Index of this process.
        world_size: Number of processes that share the data.
        threads: DALI's threads, or the torch loader's worker processes (0: decode in the calling process).
        device: Where the batches end up, such as "cpu", "cuda" or "cuda:1".
        border: Pixels to cut off at each side of an image before anything else.
        cache: "disk" decodes every image once and keeps the pixels in the package's cache folder, for all runs and
            processes; "device" keeps them in the device's memory, decoded anew by every process. Only without
            augmentation. The batches are the same.

    Raises:
        ValueError: A setting is out of its range.
    """

    batch_size: int
    image_size: int
    train: bool
    augment: Augment = "none"
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    threads: int = 2
    device: str = "cpu"
    border: int = 0
    cache: Literal["none", "disk", "device"] = "none"

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be from {low} to {high:,}, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank must be from 0 to world_size - 1 = {self.world_size - 1}, got {self.rank}")
        if not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"seed must be from 0 to {MOST_SEED}, got {self.seed}")
        if self.augment not in get_args(Augment):
            raise UserError(f"augment must be one of {', '.join(get_args(Augment))}, got {self.augment!r}")
        if self.augment != "none" and not self.train:
            raise UserError(f'augment must be "none" unless train=True, got {self.augment!r}')
        if self.cache not in ("none", "disk", "device"):
            raise UserError(f'cache must be "none", "disk" or "device", got {self.cache!r}')
        if self.cache != "none" and self.augment != "none":
            raise UserError(
                f'cache="{self.cache}" keeps one version of every image, but augment="{self.augment}" makes another '
                'each time: use cache="none" or augment="none"'
            )
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            raise UserError(f'device must be "cpu", "cuda" or "cuda:<index>", got {self.device!r}')


class LoadingError(UserError):
    """A batch could not be read or decoded."""


class Loader(Protocol):
    """An endless sequence of epochs, of which each ``iter()`` yields what is left of the current one."""

    @property
    def decoder(self) -> str:
        """What turns a file into pixels, with its version."""

    def __len__(self) -> int:
        """Batches per epoch on this rank: in training the same on all ranks; in evaluation maybe 0."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the remaining batches of the current epoch, never none at all unless ``len()`` is 0."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded batch; the end of an epoch is the start of the next.

        It holds plain values only, so ``torch.load(weights_only=True)`` reads it back. It is this rank's own.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state with the same batches, to the pixel, as the loader that it was taken from.

        Raises:
            WrongKind: It is no such state.
            ValueError: It was taken under other settings, from other images or by another backend.
        """

    def close(self) -> None:
        """End what reads ahead: worker processes and batches. Iterating again goes on from the position."""


# (epoch, indices of images): what a loader is to yield next.
Indices = tuple[int, list[int]]
# Images and labels, as `Batch` has them.
Decoded = tuple[Tensor, Tensor]


class EpochLoader(ABC):
    """Order, length, position and state: what all backends share.

    The order depends on the seed and the epoch alone. In training, an epoch is as many full batches on all ranks as
    there are images for, each image at most once; in evaluation, each rank has a fixed part.
    """

    backend: str

    def __init__(self, manifest: Manifest, config: LoaderConfig) -> None:
        global_batch = config.batch_size * config.world_size
        if config.train and len(manifest) < global_batch:
            raise UserError(
                f"{manifest.root} has {len(manifest)} training images, fewer than one batch of "
                f"{config.batch_size} on each of {config.world_size} rank(s), {global_batch} in all: "
                "lower the batch size"
            )
        self.manifest = manifest
        self.config = config
        self.device = torch.device(config.device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError(f'device="{config.device}", but torch finds no usable GPU: use device="cpu"')
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
        # Indices of the images that this rank may read: in training another part of them every epoch.
        n, rank, world = len(manifest), config.rank, config.world_size
        self.share = range(n) if config.train else range(n * rank // world, n * (rank + 1) // world)
        self._length = n // global_batch if config.train else -(-len(self.share) // config.batch_size)
        self._epoch = self._batch = 0
        self._batches: Iterator[Decoded] | None = None  # from the position on

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        order, size = self._order(epoch), self.config.batch_size
        while self._epoch == epoch and self._length:
            indices = torch.from_numpy(order[self._batch * size : (self._batch + 1) * size].copy())
            if self._batches is None:
                self._batches = self.decoded(self._upcoming())
            images, labels = next(self._batches)
            self._batch += 1
            if self._batch == self._length:
                self._epoch, self._batch = epoch + 1, 0
                if not self.config.train:
                    self._batches = None
            # Only now, so that a state taken while the caller has the batch is the one after it.
            yield Batch(images, labels, indices)

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings(), "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        settings = self.settings()
        saved = conform(state.get("settings"), dict[str, Any], "loader: settings")
        if different := [name for name in settings if saved.get(name) != settings[name]]:
            detail = ", ".join(f"{name} (was {saved.get(name)!r}, is {settings[name]!r})" for name in different)
            raise UserError(f"this loader cannot continue from the saved state, because of another {detail}")
        self._epoch = conform(state.get("epoch"), Annotated[int, Range(0, math.inf)], "loader: epoch")
        self._batch = conform(state.get("batch"), Annotated[int, Range(0, max(0, len(self) - 1))], "loader: batch")
        self._batches = None

    def close(self) -> None:
        self._batches = None  # nobody else has it: it is closed

    def decoded(self, batches: Iterable[Indices]) -> Iterator[Decoded]:
        """`decode`, whose errors become a `LoadingError` that names the images."""
        asked: deque[list[int]] = deque()

        def watched() -> Iterator[Indices]:
            for batch in batches:
                asked.append(batch[1])
                yield batch

        batches_of_pixels = self.decode(watched())
        while True:
            try:
                batch = next(batches_of_pixels, None)
            except LoadingError:
                raise
            except (ImageError, RuntimeError, OSError) as error:
                self._batches = None
                raise LoadingError(self._blame(asked[0] if asked else [], error)) from error
            if batch is None:
                return
            asked.popleft()
            yield batch

    def _blame(self, indices: list[int], error: Exception) -> str:
        if isinstance(error, ImageError):
            bad = [str(error)]
        else:  # a decoder of many images at once: look for what PIL cannot decode either
            reader, bad = self.manifest.reader(), []
            for i in indices:
                try:
                    reader.image(i, self.config.border)
                except ImageError as why:
                    bad.append(str(why))
        if bad:
            return (
                f"{'; '.join(bad[:5])}{ellipsis(bad)}. It was damaged or removed after the scan, or the images "
                "were not verified: repair or remove it, or scan them again"
            )
        names = [self.manifest.reader().name(i) for i in indices]
        return (
            f"a batch could not be decoded, but PIL can decode each of its images, and does so with the loader "
            f'backend "torch": {", ".join(names)}. {self.backend} says: {error}'
        )

    def settings(self) -> dict[str, Any]:
        """Everything that the order or the pixels depend on."""
        names = ("train", "batch_size", "image_size", "augment", "seed", "rank", "world_size", "border")
        settings = {name: getattr(self.config, name) for name in names}
        return {"backend": self.backend, "images": self.manifest.fingerprint, **settings}

    def _upcoming(self) -> Iterator[Indices]:
        """Yield what comes from the current position on: in training without end, else to the end of the epoch.

        What reads it is ahead of the position, and in training goes into the next epoch without a pause. Between
        evaluations nothing is kept: neither processes nor batches.
        """
        epoch, start, size = self._epoch, self._batch, self.config.batch_size
        while True:
            mine = self._order(epoch)
            for i in range(start, self._length):
                yield epoch, mine[i * size : (i + 1) * size].tolist()
            if not self.config.train:
                return
            epoch, start = epoch + 1, 0

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.config.train:
            return np.array(self.share, dtype=np.int64)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.manifest))
        return order[self.config.rank :: self.config.world_size]

    @property
    @abstractmethod
    def decoder(self) -> str:
        """What turns a file into pixels, with its version."""

    @abstractmethod
    def decode(self, batches: Iterator[Indices]) -> Iterator[Decoded]:
        """Yield the batches of these images, in this order, reading ahead; of any size up to ``batch_size``."""
