"""A training step in one of its variants, ready to run: models, a batch, an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._dynamo.config
from torch import Tensor

from maskcf_fast import bias_gelu, residual_norm
from maskcf_fast.core.precision import autocast
from maskcf_fast.methods import (
    CounterfactualDistiller,
    FeatureDistillation,
    FineTuning,
    MaskStrategy,
    Method,
    paper_order_step,
    strategy_names,
)
from maskcf_fast.methods.paper_order import paper_cam
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer, VisionTransformerConfig
from maskcf_fast.models.blocks import POINTWISE, activate, norm, rotate
from maskcf_fast.training import speed

from . import measure as m

STRATEGIES = strategy_names()
CLASSES = 1000
PLAIN = (norm, partial(residual_norm, impl="reference"), partial(bias_gelu, impl="reference"), activate, rotate)


class Unavailable(Exception):
    """A variant cannot be had on this machine; the text says why."""


class Variant(NamedTuple):
    """How a step is computed.

    Attributes:
        method: ``"FT"``, ``"FD"``, or a masking strategy.
        order: ``"two passes"`` (`Method.backward`), ``"one graph"``, or ``"paper"`` (`paper_order_step`).
        run: ``"eager"``, ``"compiled"``, ``"graphed"`` (compiled, and replayed as a CUDA graph), or ``"compiled
            blocks"``: plain PyTorch in place of the fused ops, and `torch.compile` on every block as a whole, where no
            map is needed (its gradient goes to a place within the block).
        precision: ``"fp32"``, its products rounded as IEEE wants; ``"tf32"``, on a GPU's matrix units; or ``"bf16"``.
    """

    method: str
    order: str = "two passes"
    run: str = "eager"
    precision: str = "fp32"

    def paper(self, **changes: str) -> Variant:
        """The paper's order, written plainly, at the same precision unless ``changes`` say otherwise."""
        return self._replace(order="paper", run="eager")._replace(**changes)

    def __str__(self) -> str:
        order = {"paper": "paper's order", "one graph": "one graph"}.get(self.order)
        run = None if self.run == "eager" else self.run
        return ", ".join(filter(None, (self.method, order, run, self.precision)))


class Workload:
    """A student, a teacher of other random weights, a batch as the loader delivers it, and an optimiser."""

    def __init__(self, config: VisionTransformerConfig, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.batch, self.device = config, batch, device
        with device:
            self.student = ImageClassifier(VisionTransformer(config), CosineClassifier(config.feature_dim, CLASSES))
            self.teacher = VisionTransformer(config).requires_grad_(False)
        self.narrow_teacher: VisionTransformer | None = (
            None  # for steps in bf16 but the paper's order, once there is one
        )
        side = config.image_size
        self.images = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, device=device)
        self.pixels = (self.images.permute(0, 3, 1, 2).float() / 255).contiguous()
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.1, fused=True)
        self._compiled: tuple[Callable[..., Any], ...] | None = None
        self._made: dict[Any, Any] = {}  # blocks as they are compiled as a whole

    def method(self, variant: Variant) -> Method:
        """The training method of a variant, at its precision."""
        method: Method
        low = variant.precision == "bf16"
        teacher = self.teacher
        if low:
            teacher = self.narrow_teacher = self.narrow_teacher or copy.deepcopy(teacher)
        if variant.method == "FT":
            method = FineTuning(self.student)
        elif variant.method == "FD":
            method = FeatureDistillation(self.student, teacher)
        else:
            method = CounterfactualDistiller(self.student, teacher, variant.method)
        method.precision = "bf16" if low else "fp32"
        if low:
            method.narrow_teacher()
        return method

    def backward(self, variant: Variant) -> m.Call:
        """The step's backward passes, which add to the parameters' gradients.

        Raises:
            Unavailable: This variant cannot be had here; says why.
        """
        call: Callable[..., Any]
        pointwise: Any = POINTWISE
        if variant.order == "paper":
            call = self._paper(variant)
        else:
            method = self.method(variant)
            if variant.run == "graphed" and (reason := speed.why_no_graph(self.device, 1, method)):
                raise Unavailable(reason.partition("left out: ")[2])
            if variant.run in ("compiled", "graphed") and self._compiled is None:
                self._compiled = self._compile(method)
            call = self._graphed(method) if variant.run == "graphed" else method.backward
            if variant.order == "one graph":
                call = partial(_one_graph, method)
            if variant.run == "compiled blocks":
                if variant.method in STRATEGIES and MaskStrategy.from_name(variant.method).needs_cam:
                    raise Unavailable("the map's gradient goes to a place within the block")
                pointwise = PLAIN
            elif variant.run != "eager":
                pointwise = self._compiled
            call = partial(call, generator=self.generator)

        def run() -> None:
            self._set(pointwise)
            try:
                with products(variant.precision), self._blocks(variant.run == "compiled blocks"):
                    call(self.pixels if variant.order == "paper" else self.images, self.labels)
            finally:
                self._set(POINTWISE)

        return run

    def _paper(self, variant: Variant) -> Callable[..., None]:
        strategy = MaskStrategy.from_name(variant.method)
        if variant.run == "compiled" and strategy.filling.leaves_out:
            raise Unavailable("compiled for fills only")
        compiled = torch.compile(paper_order_step, dynamic=False)
        given = MaskStrategy("random", strategy.fill, rate=0.5)  # takes the mask that is drawn, whatever it is
        models = (self.student, self.teacher)

        def run(images: Tensor, labels: Tensor) -> None:
            draw = strategy.draw(self.batch, self.config.num_patches, generator=self.generator, device=self.device)
            with autocast(self.device, variant.precision):
                if variant.run == "eager":
                    out = paper_order_step(*models, strategy, images, labels, draw)
                else:  # gradients of maps inside a compiled graph cannot be had: the map is taken outside
                    cam = paper_cam(self.student, images, labels) if strategy.needs_cam else None
                    out = compiled(*models, given, images, labels, draw._replace(mask=strategy.mask(cam, draw)))
                out.loss.backward()

        return run

    def _compile(self, method: Method) -> tuple[Callable[..., Any], ...]:
        torch.compiler.reset()  # this model's shapes are the first: no limit on recompilations
        if reason := speed.compile_pointwise(method, self.device):
            raise Unavailable(reason.partition("left out, ")[2])
        block: Any = self.student.transformer.blocks[0]
        compiled = block.pointwise
        self._set(POINTWISE)
        return compiled

    def _backbones(self) -> list[VisionTransformer]:
        return [x for x in (self.student.transformer, self.teacher, self.narrow_teacher) if x is not None]

    def _set(self, pointwise: Any) -> None:
        for backbone in self._backbones():
            backbone.set_pointwise(pointwise)

    @contextmanager
    def _blocks(self, compiled: bool) -> Iterator[None]:
        """Within, calls of a block go to the compiler, which keeps what it has made of it."""
        blocks: list[Any] = [block for backbone in self._backbones() for block in backbone.blocks] if compiled else []
        for block in blocks:
            if block not in self._made:
                # With and without gradients, first, last and in between, each dtype: more than the default 8.
                torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
                self._made[block] = torch.compile(block._call_impl, dynamic=False)
            block._compiled_call_impl = self._made[block]
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def _graphed(self, method: Method) -> Callable[..., None]:
        graphed = speed.GraphedBackward(method, self.generator)
        grads: list[Tensor] = []

        def run(images: Tensor, labels: Tensor, **options: Any) -> None:
            calls = 1
            if not grads:  # captured with these gradients, which the other variants take away
                grads.extend(torch.zeros_like(p) for p in self.parameters)
                calls += speed.Graphed.WARM_UP
            for p, grad in zip(self.parameters, grads, strict=True):
                p.grad = grad
            for _ in range(calls):
                torch._foreach_zero_(grads)
                graphed(images, labels, **options)

        return run

    def step(self, backward: m.Call, *, keep: bool = False) -> m.Call:
        """A whole training step; ``keep`` leaves the gradients' memory in place between steps."""

        def run() -> None:
            self.optimizer.zero_grad(set_to_none=not keep)
            backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            self.optimizer.step()

        return run

    def peak_memory(self, backward: m.Call) -> int | None:
        """Bytes above weights, gradients and moments at the highest point of a step, after one that is not weighed."""
        step = self.step(backward, keep=True)
        step()
        return m.peak_memory(step, self.device)


def _one_graph(method: Method, *batch: Tensor, **options: Any) -> None:
    method(*batch, **options).loss.backward()


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of float32 in float32, or with ``"tf32"`` on a GPU's matrix units; convolutions likewise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
