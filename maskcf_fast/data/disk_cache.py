"""Decoded pixels in files, written once by all processes together, and checked as they are first read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..core.files import atomic_write, cache_dir
from .loader import EpochLoader, Indices

CHUNK_BYTES = 64 * 2**20  # of pixels per file, roughly
_VERSION = 1  # to be raised whenever the files would hold something else


class DiskCache:
    """The decoded images of a manifest, in a folder named by a digest of the images and of how they are decoded.

    A chunk is a file of pixels, uint8 ``[K, S, S, 3]``, and a CRC-32 of each image, uint32 ``[K]``. It appears as a
    whole, so an interrupted cache is continued where it was. Several processes, also of different runs, take a
    chunk each, under a lock that ends with the process. Images are checked when a process first reads them: a
    checksum of everything at the start would read a large cache twice.

    Args:
        loader: Decodes what is missing, in the given batch size.

    Raises:
        LoadingError: An image cannot be decoded.
        OSError: The cache cannot be written, or does not fit on the disk.
    """

    def __init__(self, loader: EpochLoader) -> None:
        self._loader = loader
        self._n, self._side = len(loader.manifest), loader.config.image_size
        self._per_chunk = max(1, CHUNK_BYTES // (self._side**2 * 3))
        self._chunks = -(-self._n // self._per_chunk)
        self.folder = cache_dir("pixels", _digest(loader))
        self._checked = np.zeros(self._n, dtype=bool)
        self._maps: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint32]]] = {}
        about = {"root": str(loader.manifest.root), "images": self._n, "size": self._side, "decoder": loader.decoder}
        atomic_write(self.folder / "about.json", json.dumps(about).encode())
        self._lock_file: BinaryIO = open(self.folder / "lock", "a+b")  # noqa: SIM115 (as long as the cache)
        self._build()

    def gather(self, indices: list[int], out: NDArray[np.uint8]) -> None:
        """Copy images into ``out``, uint8 ``[N, S, S, 3]``."""
        for row, i in enumerate(indices):
            chunk, k = divmod(i, self._per_chunk)
            pixels, checks = self._map(chunk)
            if not self._checked[i]:
                if zlib.crc32(pixels[k]) != checks[k]:
                    self._repair(chunk)
                    pixels, checks = self._map(chunk)
                self._checked[i] = True
            out[row] = pixels[k]

    def _members(self, chunk: int) -> range:
        return range(chunk * self._per_chunk, min((chunk + 1) * self._per_chunk, self._n))

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06}.bin"

    def _map(self, chunk: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        if chunk not in self._maps:
            k, pixels = len(self._members(chunk)), self._side**2 * 3
            content = np.memmap(self._path(chunk), dtype=np.uint8, mode="r")
            shaped = content[: k * pixels].reshape(k, self._side, self._side, 3)
            self._maps[chunk] = shaped, np.frombuffer(content[k * pixels :].tobytes(), dtype="<u4")
        return self._maps[chunk]

    def _complete(self, chunk: int) -> bool:
        try:
            size = self._path(chunk).stat().st_size
        except FileNotFoundError:
            return False
        if size == len(self._members(chunk)) * (self._side**2 * 3 + 4):
            return True
        print(f"{self._path(chunk)} has a wrong size: its images are decoded again.", file=sys.stderr)
        self._path(chunk).unlink(missing_ok=True)
        return False

    def _build(self) -> None:
        """Decode what no other process decodes, then wait for theirs, and take over what they leave."""
        while missing := [chunk for chunk in range(self._chunks) if not self._complete(chunk)]:
            self._require_space(missing)
            self._decode(missing)
            if left := [chunk for chunk in missing if not self._complete(chunk)]:
                with self._locked(left[0]):
                    pass

    def _require_space(self, missing: list[int]) -> None:
        needed = sum(len(self._members(chunk)) for chunk in missing) * (self._side**2 * 3 + 4)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f'cache="disk": {needed / 2**30:.2f} GiB of pixels are yet to be written to {self.folder}, but only '
                f"{free / 2**30:.2f} GiB are free: make room, or set MASKCF_CACHE to a folder on a larger disk"
            )

    def _decode(self, chunks: list[int]) -> None:
        """Decode and write those of the chunks that are not locked."""
        taken: deque[int] = deque()

        def claimed() -> Iterator[Indices]:
            step = self._loader.config.batch_size
            for chunk in chunks:
                # Complete, if another process has written it since.
                if self._try_lock(chunk):
                    if self._complete(chunk):
                        self._unlock(chunk)
                        continue
                    taken.append(chunk)
                    members = self._members(chunk)
                    yield from ((0, list(members[i : i + step])) for i in range(0, len(members), step))

        parts: list[NDArray[np.uint8]] = []
        show = self._loader.config.rank == 0
        try:
            with tqdm(total=self._n, desc="decoding", unit="img", delay=2, disable=not show) as bar:
                for images, _ in self._loader.decoded(claimed()):
                    parts.append(images.cpu().numpy())
                    if sum(map(len, parts)) == len(self._members(taken[0])):
                        self._write(taken[0], np.concatenate(parts))
                        self._unlock(taken.popleft())
                        parts = []
                        done = len(list(self.folder.glob("*.bin"))) * self._per_chunk
                        bar.update(min(done, self._n) - bar.n)  # of all processes
        finally:
            while taken:
                self._unlock(taken.popleft())

    def _write(self, chunk: int, pixels: NDArray[np.uint8]) -> None:
        checks = np.array([zlib.crc32(image) for image in pixels], dtype="<u4")
        atomic_write(self._path(chunk), pixels.tobytes() + checks.tobytes())

    def _repair(self, chunk: int) -> None:
        """Decode a chunk again, unless another process already has."""
        with self._locked(chunk):
            self._forget(chunk)
            pixels, checks = self._map(chunk)
            if all(zlib.crc32(image) == check for image, check in zip(pixels, checks, strict=True)):
                return
            print(f"{self._path(chunk)} is damaged: its images are decoded again.", file=sys.stderr)
            members, step = self._members(chunk), self._loader.config.batch_size
            batches = ((0, list(members[i : i + step])) for i in range(0, len(members), step))
            parts = [images.cpu().numpy() for images, _ in self._loader.decoded(batches)]
            self._write(chunk, np.concatenate(parts))
            self._forget(chunk)

    def _forget(self, chunk: int) -> None:
        self._maps.pop(chunk, None)
        members = self._members(chunk)
        self._checked[members.start : members.stop] = False

    # One byte of the lock file stands for one chunk. Such locks end with their process, hold across machines that
    # share the folder, and are not inherited by worker processes.

    def _try_lock(self, chunk: int) -> bool:
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, chunk, os.SEEK_SET)
        except BlockingIOError:
            return False
        return True

    def _unlock(self, chunk: int) -> None:
        fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, chunk, os.SEEK_SET)

    @contextmanager
    def _locked(self, chunk: int) -> Iterator[None]:
        fcntl.lockf(self._lock_file, fcntl.LOCK_EX, 1, chunk, os.SEEK_SET)
        try:
            yield
        finally:
            self._unlock(chunk)


def _digest(loader: EpochLoader) -> str:
    """Of the images, which count as others when a size or time of change is another, and of the transform."""
    manifest = loader.manifest
    content: list[Any] = [_VERSION, CHUNK_BYTES, loader.decoder, loader.config.image_size, manifest.fingerprint]
    content.append([manifest.stamps(), loader.config.border])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
