"""The loader that decodes with NVIDIA DALI: on the GPU if that is the device, else on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np
import PIL
import torch

from ..core.optional import need
from ..core.schema import conform
from .jpeg import is_plain_jpeg
from .loader import Decoded, EpochLoader, Indices, LoaderConfig
from .manifest import Manifest
from .transforms import CROP_AREA, CROP_RATIO, OPERATIONS, STRENGTH

PREFETCH = 2  # batches that are ready, or being made, while the caller has one


class DaliLoader(EpochLoader):
    """One DALI pipeline for training and evaluation, CPU and GPU. See :class:`~maskcf_fast.data.Loader`.

    DALI decodes JPEGs of the common form. Of other files, decoders differ in which they refuse and in what they see:
    `read_image` decodes them, as for the torch loader, and DALI gets their pixels.

    DALI is told which images to read by an external source. Its own readers know no order but their own:
    ``readers.file`` leaves padding of one epoch in the next when shards are uneven, and ``readers.webdataset``
    shuffles within a window only and shares out whole shards.

    Args:
        manifest: The images.
        config: The settings.

    Raises:
        ImportError: DALI is not installed, or does not load.
        RuntimeError: The device is a GPU and there is none.
        ValueError: Fewer training images than one batch on each rank.
    """

    backend = "dali"

    def __init__(self, manifest: Manifest, config: LoaderConfig) -> None:
        need("nvidia.dali", instead='use the loader backend "torch" (DALI is for Linux on x86-64)')
        try:
            import_module("nvidia.dali")
        except ImportError as error:  # it is there, but for another system or CUDA
            raise ImportError(f'NVIDIA DALI cannot be imported ({error}): use the loader backend "torch"') from error
        super().__init__(manifest, config)
        self._pipeline: Any = None  # of a loader that augments: it has the state of the random numbers
        self._checkpoint: bytes | None = None

    def state_dict(self) -> dict[str, Any]:
        checkpoint = self._pipeline.checkpoint() if self._pipeline else self._checkpoint
        return {**super().state_dict(), "checkpoint": checkpoint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # DALI itself would accept a checkpoint of other settings and silently continue with something else.
        super().load_state_dict(state)
        self._pipeline, self._checkpoint = None, conform(state.get("checkpoint"), bytes | None, "loader: checkpoint")

    def settings(self) -> dict[str, Any]:
        # The GPU's decoder rounds otherwise, and a checkpoint names the operators.
        return {**super().settings(), "device": self.device.type}

    @property
    def decoder(self) -> str:
        return f"DALI {import_module('nvidia.dali').__version__} on {self.device.type}, PIL {PIL.__version__}"

    def decode(self, batches: Iterator[Indices]) -> Iterator[Decoded]:
        pipeline = self.build_pipeline(batches)
        if self.config.augment != "none":
            self._pipeline = pipeline
        # On a GPU the outputs belong to the caller's stream: nothing waits on the host, and DALI reuses their
        # memory only after what that stream still has to do with it.
        on_stream = {"cuda_stream": torch.cuda.current_stream(self.device)} if self.device.type == "cuda" else {}
        while True:
            try:
                outputs = pipeline.run(**on_stream)
            except StopIteration:
                return
            # The tensors own their memory: DALI's dynamic executor hands each buffer over with the output.
            images, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
            yield images, labels

    def _read_ahead(self, batches: Iterator[Indices]) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Yield the images' bytes and labels."""
        labels = np.array(self.manifest.labels, dtype=np.int64)
        reader, border = self.manifest.reader(), self.config.border

        def read(i: int) -> np.ndarray:
            data = reader.encoded(i)
            if border or not is_plain_jpeg(data):
                image = reader.image(i, border)
                data = b"P6 %d %d 255\n" % image.size + image.tobytes()
            return np.frombuffer(data, np.uint8)

        # In Python's threads, a batch ahead. Not in a with, which would wait for them wherever the garbage collector
        # finds a forgotten generator.
        threads = ThreadPoolExecutor(max(1, self.config.threads))
        waiting = None
        for _, indices in batches:
            ready, waiting = waiting, (threads.map(read, indices), labels[indices])
            if ready:
                yield list(ready[0]), ready[1]
        if waiting:
            yield list(waiting[0]), waiting[1]

    def build_pipeline(self, batches: Iterator[Indices]) -> Any:
        """Return a built pipeline of (images uint8 ``[N, S, S, 3]``, labels int64 ``[N]``) of these batches."""
        dali: Any = import_module("nvidia.dali")  # as Any: its stubs lack much of what it has
        fn, types = dali.fn, dali.types
        config = self.config
        on_gpu = self.device.type == "cuda"
        size = config.image_size
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}
        crop = {"random_area": CROP_AREA, "random_aspect_ratio": CROP_RATIO}
        random = config.augment != "none"
        turned = {"adjust_orientation": self.manifest.upright}
        rand = config.augment == "randaugment"
        rand_augment: Any = rand and import_module("nvidia.dali.auto_aug.rand_augment").rand_augment
        ahead = self._read_ahead(batches)

        def source(_: Any) -> tuple[list[np.ndarray], np.ndarray]:  # DALI wants to tell it the batch's number
            return next(ahead)

        @dali.pipeline_def(
            batch_size=config.batch_size,
            num_threads=max(1, config.threads),
            device_id=self.device.index if on_gpu else None,
            seed=int(np.random.SeedSequence([config.seed, config.rank]).generate_state(1)[0]),
            enable_checkpointing=random,
            checkpoint=self._checkpoint if random else None,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,
            enable_conditionals=rand,
        )
        def pipeline() -> tuple[Any, Any]:
            encoded, labels = fn.external_source(
                source=source, batch=True, num_outputs=2, dtype=[types.UINT8, types.INT64], ndim=[1, 0]
            )
            # By default the share of the hardware decoder, on GPUs that have one, is 65 % of the images.
            decoder = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB, **turned}
            if not random:
                images = fn.decoders.image(encoded, **decoder)
                # Sizes and offsets in integers, as torchvision has them. DALI's resize_shorter and crop round
                # differently, which moves the whole picture by up to a pixel.
                shape = fn.slice(fn.peek_image_shape(encoded, dtype=types.INT32, **turned), start=0, shape=2, axes=0)
                resized = shape * size // fn.reductions.min(shape)
                margin = resized - size
                half = margin // 2
                offset = half + (margin & half & 1)  # margin / 2, ties to even
                images = fn.resize(images, size=fn.cast(resized, dtype=types.FLOAT), **cubic)
                images = fn.slice(images, start=offset, shape=[size, size], axes=[0, 1])
            else:
                if on_gpu:  # the hardware decoder decodes whole images only
                    images = fn.random_resized_crop(fn.decoders.image(encoded, **decoder), size=size, **crop, **cubic)
                else:  # a tenth faster than decoding all of it
                    images = fn.decoders.image_random_crop(encoded, **decoder, **crop)
                    images = fn.resize(images, size=[size, size], **cubic)
                images = fn.flip(images, horizontal=fn.random.coin_flip())
            if rand:
                images = rand_augment(images, OPERATIONS, STRENGTH, shape=(size, size), fill_value=0)
            return images, labels.gpu() if on_gpu else labels

        built = pipeline()
        built.build()
        return built
