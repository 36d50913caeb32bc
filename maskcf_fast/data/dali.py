"""The loader that decodes with NVIDIA DALI: on the GPU if that is the device, else on the CPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch

from .loader import Batch, EpochLoader, LoaderConfig
from .manifest import Manifest
from .transforms import CROP_AREA, CROP_RATIO


class DaliLoader(EpochLoader):
    """One DALI pipeline for training and evaluation, CPU and GPU. See :class:`~maskcf_fast.data.Loader`.

    It runs the pipeline itself and counts the batches. DALI's own torch iterator, with uneven shards and
    ``LastBatchPolicy.DROP``, leaves padding of one epoch in the next.

    Args:
        manifest: The images.
        config: The settings.

    Raises:
        ImportError: DALI is not installed.
        RuntimeError: The device is a GPU and there is none.
        ValueError: Fewer training images than one batch on each rank.
    """

    backend = "dali"

    def __init__(self, manifest: Manifest, config: LoaderConfig) -> None:
        try:
            import_module("nvidia.dali")
        except ImportError as error:
            raise ImportError(
                "NVIDIA DALI cannot be imported: install nvidia-dali-cuda130 (Linux x86-64 only) "
                'or use the loader backend "torch"'
            ) from error
        super().__init__(manifest, config)
        # The reader shares images out evenly, but for one, and fills up every rank's last batch by repeating an
        # image. It reads as many batches on all ranks; in training they may be one more than are wanted.
        shards = config.world_size if config.train else 1
        read = -(-len(self._share) // (shards * config.batch_size))
        self._surplus_batches = read - self._length
        # Built when first needed: a restored loader would otherwise build, and fill, two of them.
        self._pipeline: Any = None
        self._checkpoint: bytes | None = None

    def state_dict(self) -> dict[str, Any]:
        checkpoint = self._pipeline.checkpoint() if self._pipeline else self._checkpoint
        return {**super().state_dict(), "checkpoint": checkpoint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # DALI itself would accept a checkpoint of other settings and silently continue with something else.
        super().load_state_dict(state)
        self._pipeline, self._checkpoint = None, state["checkpoint"]

    def _settings(self) -> dict[str, Any]:
        # The checkpoint names the operators, and those of the CPU and of the GPU differ.
        return {**super()._settings(), "device": self.device.type}

    def _next(self) -> Batch:
        if self._pipeline is None:
            self._pipeline = self._build_pipeline()
        # The tensors own their memory: DALI's dynamic executor hands each buffer over with the output.
        batch = Batch(*(torch.from_dlpack(output.as_tensor()) for output in self._pipeline.run()))
        if self.config.train:
            return batch
        left = len(self._share) - self._batch * self.config.batch_size
        return Batch(*(tensor[:left] for tensor in batch))

    def _end_epoch(self) -> None:
        for _ in range(self._surplus_batches):
            self._pipeline.run()

    def _build_pipeline(self) -> Any:
        """Return a built pipeline of (images uint8 ``[N, S, S, 3]``, labels int64 ``[N]``)."""
        dali: Any = import_module("nvidia.dali")  # as Any: its stubs lack much of what it has
        fn, types = dali.fn, dali.types
        manifest, config = self.manifest, self.config
        on_gpu = self.device.type == "cuda"
        size = config.image_size
        cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}

        @dali.pipeline_def(
            batch_size=config.batch_size,
            num_threads=max(1, config.threads),
            device_id=self.device.index if on_gpu else None,
            seed=int(np.random.SeedSequence([config.seed, config.rank]).generate_state(1)[0]),
            enable_checkpointing=True,
            checkpoint=self._checkpoint,
            exec_dynamic=True,
        )
        def pipeline() -> tuple[Any, Any]:
            # Only shuffle_after_epoch truly shuffles the whole list; it needs the same seed on all ranks.
            order = {
                "shuffle_after_epoch": True,
                "shuffle_after_epoch_seed": config.seed,
                "shard_id": config.rank,
                "num_shards": config.world_size,
            }
            encoded, labels = fn.readers.file(
                files=[f"{manifest.root}/{manifest.paths[i]}" for i in self._share],
                labels=[manifest.labels[i] for i in self._share],
                pad_last_batch=True,
                **(order if config.train else {}),
            )
            images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            if config.augment == "crop-flip":
                images = fn.random_resized_crop(
                    images, size=[size, size], random_area=CROP_AREA, random_aspect_ratio=CROP_RATIO, **cubic
                )
                images = fn.flip(images, horizontal=fn.random.coin_flip())
            else:
                # Sizes and offsets in integers, as torchvision has them. DALI's resize_shorter and crop round
                # differently, which moves the whole picture by up to a pixel.
                shape = fn.slice(fn.peek_image_shape(encoded, dtype=types.INT32), start=0, shape=2, axes=0)
                resized = shape * size // fn.reductions.min(shape)
                margin = resized - size
                half = margin // 2
                offset = half + (margin & half & 1)  # margin / 2, ties to even
                images = fn.resize(images, size=fn.cast(resized, dtype=types.FLOAT), **cubic)
                images = fn.slice(images, start=offset, shape=[size, size], axes=[0, 1])
            labels = fn.squeeze(fn.cast(labels, dtype=types.INT64), axes=0)
            return images, labels.gpu() if on_gpu else labels

        built = pipeline()
        built.build()
        return built
