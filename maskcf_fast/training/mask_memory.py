"""Masks that are kept from one epoch for the next: without augmentation, an image has the same pixels in all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..core.processes import Processes
from ..data import Batch
from ..methods import CounterfactualDistiller, StepOutput

NO_GRAPH = "--cuda-graph is left out: --method.cam-every makes steps of two kinds, with a map and without"


class MaskMemory:
    """Takes an image's object or context mask from a map once every few epochs, and in between from memory.

    An approximation: the map is that of the model as it was then. Training drops an epoch's last, incomplete batch,
    so a few images are new to a later epoch; their masks are made when they come.

    Args:
        method: Makes the masks, and takes them.
        num_images: Of the training data.
        every: Epochs from one map of an image to the next.
        processes: Those that share the data. Each knows the masks of its own images until `merge`.
    """

    def __init__(self, method: CounterfactualDistiller, num_images: int, every: int, processes: Processes) -> None:
        self.method = method
        self.every = every
        self.processes = processes
        self.masks = torch.zeros(
            num_images, method.student.backbone.config.num_patches, dtype=torch.bool, device=processes.device
        )
        self.known = torch.zeros(num_images, dtype=torch.bool)  # on the CPU: reading it waits for nothing

    def start_epoch(self, epoch: int) -> None:
        """Forget everything, if this is an epoch of new maps."""
        if epoch % self.every == 0:
            self.known.zero_()
            self.masks.zero_()  # what `merge` expects of images that are not known

    def backward(self, batch: Batch, **options: Any) -> StepOutput:
        """As `CounterfactualDistiller.backward`, with the images' masks from memory where they are known.

        Where none is, the step makes its map as usual; where a few are not, a forward and a backward pass of these
        few images comes before it.
        """
        images, labels, indices = batch
        new = (~self.known[indices]).nonzero()[:, 0]
        if len(new) == len(indices):
            out = self.method.backward(images, labels, **options)
            assert out.mask is not None
            self._keep(indices, out.mask)
            return out
        if len(new):
            rows = self._to_device(new)
            self._keep(indices[new], self.method.select(images[rows], labels[rows]))
        return self.method.backward(images, labels, mask=self.masks[self._to_device(indices)], **options)

    def merge(self) -> None:
        """Tell all processes what each has learned. An image comes to one of them only in an epoch."""
        if self.processes.world_size > 1:
            known = self._to_device(self.known).view(torch.uint8)
            for part in (self.masks.view(torch.uint8), known):
                dist.all_reduce(part, dist.ReduceOp.MAX)
            self.known.copy_(known)

    def state_dict(self) -> dict[str, Tensor]:
        """What is known, in bits."""
        return {"known": _packed(self.known), "masks": _packed(self.masks)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state of as many images and patches.

        Raises:
            RuntimeError: It is of others.
        """
        for own, bits in ((self.known, state["known"]), (self.masks, state["masks"])):
            expected = [*own.shape[:-1], -(-own.shape[-1] // 8)]
            if list(bits.shape) != expected or bits.dtype != torch.uint8:
                raise RuntimeError(f"masks are {bits.dtype} {list(bits.shape)}, not uint8 {expected}")
            own.copy_(torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=own.shape[-1])))

    def _keep(self, indices: Tensor, masks: Tensor) -> None:
        self.masks[self._to_device(indices)] = masks
        self.known[indices] = True

    def _to_device(self, tensor: Tensor) -> Tensor:
        device = self.masks.device
        # From pinned memory, or the host would wait for the GPU.
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _packed(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=-1))
