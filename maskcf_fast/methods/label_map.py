"""Which patches speak for the label: the map that object and context masks are cut from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.names import unknown
from ..core.precision import no_autocast
from ..models import Shape, Tap
from ..ops import relevance_cam

KINDS = ("relevance", "gradcam")
TARGETS = ("logit", "logprob")


class LabelMap:
    """Makes a map ``[N, L]`` from the clean forward pass.

    Only gradients of what the map reads are asked for, so no weight gradient is formed.

    Args:
        kind: ``"relevance"`` (Chefer et al., ICCV 2021), or ``"gradcam"``: channels of the last attention's normalised
            input (the last block's, or an attention pool's), weighted by their summed gradients, positive part.
        target: ``"logit"`` of the label, or its ``"logprob"``.
        start_layer: First layer that counts in the relevance, beside an attention pool.
        config: The model's architecture.

    Raises:
        ValueError: Unknown kind or target (the nearest is suggested), or a ``start_layer`` outside the model.
    """

    def __init__(self, kind: str, target: str, start_layer: int, config: Shape) -> None:
        depth = config.depth
        for name, value, known in (("cam", kind, KINDS), ("cam_target", target, TARGETS)):
            if value not in known:
                raise unknown(name, value, known)
        if not -depth <= start_layer < depth:
            raise UserError(f"start_layer must lie in [{-depth}, {depth - 1}], got {start_layer}")
        if kind == "gradcam" and not config.native:
            raise UserError("Grad-CAM reads a layer's input, which an unmodified model does not show: take relevance")
        self.kind = kind
        self.target = target
        self.config = config
        self.start_layer = start_layer % depth  # from the front, since a pool's tap is one more than the layers

    def __call__(self, logits: Tensor, labels: Tensor, taps: Sequence[Tap]) -> Tensor:
        """The map, from a backward pass of its own; the graph of ``logits`` is kept."""
        if not logits.requires_grad:
            raise RuntimeError("the map needs gradients: call it with torch.enable_grad() and a graph")
        scores = logits if self.target == "logit" else logits.float().log_softmax(dim=1)
        score = scores.gather(1, labels[:, None]).sum()
        return self.from_gradients(taps, torch.autograd.grad(score, self.read(taps), retain_graph=True))

    def read(self, taps: Sequence[Tap]) -> list[Tensor]:
        """The activations whose gradients the map needs."""
        return [taps[-1].x] if self.kind == "gradcam" else [tap.o for tap in taps[self.start_layer :]]

    def from_gradients(self, taps: Sequence[Tap], grads: Sequence[Tensor]) -> Tensor:
        """The map from the gradients of what was `read`."""
        with no_autocast(grads[0].device):
            prefix, pool = self.config.prefix, self.config.pool
            if self.kind == "relevance":
                readout = pool if isinstance(pool, str) else torch.tensor(pool, device=grads[0].device)
                return relevance_cam(taps[self.start_layer :], grads, prefix=prefix, readout=readout)
            activations, channels = taps[-1].x.detach().float(), grads[0].float().sum(dim=1)
            return (activations[:, prefix:] @ channels[:, :, None])[..., 0].clamp(min=0)
