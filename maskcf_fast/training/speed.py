"""Options that make a step faster and leave its result as it is; with a message, none where one cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distill import Method, StepOutput
from ..distill.methods import run
from ..models import VisionTransformer

Backward = Callable[..., StepOutput]


def compile_pointwise(method: Method, device: torch.device) -> str | None:
    """Compile what lies between the matrix products of all models; why not, if that cannot be done here."""
    backbones = [module for module in method.modules() if isinstance(module, VisionTransformer)]
    for backbone in backbones:
        backbone.compile_pointwise()
    try:  # compilers report what they lack when first used
        for backbone in backbones:
            width = backbone.config.width
            x = torch.zeros(1, 2, width, device=device, requires_grad=True)
            backbone.blocks[0](x)[0].sum().backward()
    except Exception as error:
        for backbone in backbones:
            backbone.compile_pointwise(False)
        return f"--compile is left out, the compiler failed: {str(error).strip().splitlines()[0]}"
    finally:
        method.zero_grad(set_to_none=True)
    return None


class GraphedBackward:
    """`Method.backward` as one CUDA graph: the host launches a step's thousands of kernels at once.

    Clipping and the optimiser, whose beta1 changes at every step, stay outside: a few launches more. Steps of
    another batch size or scale than the first one's run without the graph.

    Args:
        method: Its parameters' gradients stay where they are: set them to zero, not to None.
        generator: Of the donors and random masks.
    """

    def __init__(self, method: Method, generator: torch.Generator) -> None:
        self.method = method
        self.generator = generator
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
        last: Callable[[Callable[[], Tensor]], Tensor] = run,
    ) -> StepOutput:
        """As `Method.backward`; ``generator`` and ``last`` are always the same."""
        if self.graph is None:
            self._capture(images, labels, {"generator": generator, "scale": scale, "last": last})
        assert self.graph is not None
        same = (images.shape, images.dtype, scale) == (self.images.shape, self.images.dtype, self.scale)
        if not same:  # as in an epoch's last step, of fewer images or micro-batches
            return self.method.backward(images, labels, generator=generator, scale=scale, last=last)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.out

    def _capture(self, images: Tensor, labels: Tensor, options: dict[str, Any]) -> None:
        """Capture the step; neither gradients nor the generator move by it."""
        self.images, self.labels, self.scale = images.clone(), labels.clone(), options["scale"]
        trained = [p for p in self.method.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad.clone() for p in trained if p.grad is not None]
        state = self.generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and tuned, libraries allocate
                self.method.backward(self.images, self.labels, **options)
        torch.cuda.current_stream().wait_stream(side)
        self.generator.set_state(state)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self.out = self.method.backward(self.images, self.labels, **options)
        self.generator.set_state(state)
        for p, grad in zip(trained, grads, strict=True):
            p.grad.copy_(grad)  # type: ignore[union-attr]
        self.graph = graph


def why_no_graph(device: torch.device, world_size: int, method: Method) -> str | None:
    """Why `GraphedBackward` cannot be used; None if it can."""
    if device.type != "cuda":
        return f"--cuda-graph is left out: it is for a GPU, and the device is {device}"
    if world_size > 1:
        return f"--cuda-graph is left out: it is for one process, and there are {world_size}"
    strategy = getattr(method, "strategy", None)
    if strategy is not None and strategy.fill == "none" and strategy.dropped(1) is None:
        return f"--cuda-graph is left out: {strategy.name} by threshold keeps another number of patches at each step"
    return None
