"""Options that make a step faster and leave its result as it is; with a message, none where one cannot be had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..core.checks import debug_enabled
from ..core.precision import autocast
from ..methods import Method, StepOutput
from ..models import VisionTransformer

Backward = Callable[..., StepOutput]
T = TypeVar("T")


def compile_pointwise(method: Method, device: torch.device) -> str | None:
    """Compile what lies between the matrix products of all models; why not, if that cannot be done here."""
    backbones = [module for module in method.modules() if isinstance(module, VisionTransformer)]
    for backbone in backbones:
        backbone.compile_pointwise()
    try:  # compilers report what they lack when first used
        for backbone in backbones:
            block = copy.deepcopy(backbone.blocks[0]).to_empty(device=device)  # the model may be on the meta device yet
            x = torch.zeros(1, 2, backbone.config.width, device=device, requires_grad=True)
            with autocast(device, method.precision):
                out = block(x)[0]
            out.sum().backward()
    except Exception as error:
        for backbone in backbones:
            backbone.compile_pointwise(False)
        return f"--compile is left out, the compiler failed: {str(error).strip().splitlines()[0]}"
    return None


class Graphed(Generic[T]):
    """A function of nothing as one CUDA graph: the host launches its thousands of kernels at once.

    The first calls run it as it is, while kernels are compiled and tuned and libraries allocate; the next captures it.
    What it reads and writes besides its result must stay where it is. The memory it works in stays reserved for it.

    Args:
        function: It draws random numbers from ``generator`` only.
        generator: On the GPU.

    Raises:
        RuntimeError: On the call that captures, if something in the function cannot be captured.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[[], T], generator: torch.Generator) -> None:
        self.function = function
        self.generator = generator
        self.calls = 0
        self.side: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> T:
        """The function's result; once captured, the same tensors each time."""
        if self.calls < self.WARM_UP:
            self.calls += 1
            return self._aside()
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()
        return self.out

    def _aside(self) -> T:
        """The function, on a stream that is not the default one, as in the capture."""
        self.side = self.side or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            out = self.function()
        current.wait_stream(self.side)
        return out

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        try:
            # Loaders' threads go on calling CUDA meanwhile: only this thread's calls are held to a capture's rules.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.out = self.function()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(f"the step cannot be captured ({reason}): run without --cuda-graph") from error
        return graph


class GraphedBackward:
    """`Method.backward` as one CUDA graph, of one batch size and scale. Steps of others run without it.

    Args:
        method: Its parameters' gradients stay where they are: set them to zero, not to None.
        generator: Of the donors and random masks.
    """

    def __init__(self, method: Method, generator: torch.Generator) -> None:
        self.method = method
        self.generator = generator
        self.graphed: Graphed[StepOutput] | None = None
        self.key: tuple[Any, ...] = ()

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
    ) -> StepOutput:
        """As `Method.backward`; ``generator`` is always the same."""
        options: dict[str, Any] = {"generator": generator, "scale": scale}
        key = (images.shape, images.dtype, scale)
        # A run may be continued at an epoch's last step, of fewer images or micro-batches: what comes later counts.
        if self.graphed is None or (key != self.key and self.graphed.graph is None):
            self.key, self.images, self.labels = key, images.clone(), labels.clone()
            self.graphed = Graphed(partial(self.method.backward, self.images, self.labels, **options), self.generator)
        if key != self.key:
            return self.method.backward(images, labels, **options)
        self.images.copy_(images)
        self.labels.copy_(labels)
        return self.graphed()


def why_no_graph(device: torch.device, world_size: int, method: Method) -> str | None:
    """Why `GraphedBackward` cannot be used; None if it can."""
    if device.type != "cuda":
        return f"--cuda-graph is left out: it is for a GPU, and the device is {device}"
    if world_size > 1:
        return f"--cuda-graph is left out: it is for one process, and there are {world_size}"
    if debug_enabled():
        return "--cuda-graph is left out: MASKCF_DEBUG asks for checks that read values"
    strategy = getattr(method, "strategy", None)
    if strategy is not None and not strategy.fixed_length:
        return f"--cuda-graph is left out: {strategy.name} by threshold keeps another number of patches at each step"
    return None


BETA1_MOVES = (
    "--cuda-graph leaves out AdamW, whose beta1 moves at every step: a few launches more; "
    "--optim.cycle-beta1 False holds it still"
)
