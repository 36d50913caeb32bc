"""What a step costs, counted and not run: products, parameters, and memory by what it holds."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from ..methods import CounterfactualDistiller
from ..models import CosineClassifier, ImageClassifier, VisionTransformer, VisionTransformerConfig
from ..models.backbone import Recompute


@dataclass(frozen=True)
class Cost:
    """What one step of `CounterfactualDistiller` costs.

    Attributes:
        parameters: Numbers in the student's weights, without its head.
        flops: Of the step, two for each multiplication and addition of a product.
        memory: Bytes by what they hold, at the highest point of the step: what PyTorch's allocator hands out, not what
            the system sees. Weights are float32; attention in bf16 as on a GPU (a CPU computes it in float32).
        block: Bytes of the largest block's weights, which FSDP puts together.
    """

    parameters: int
    flops: int
    memory: Mapping[str, int]
    block: int

    @property
    def total(self) -> int:
        """Bytes in one process that has everything."""
        return sum(self.memory.values())

    def divided(self, processes: int) -> int:
        """Bytes in each process where FSDP divides weights, gradients, moments and teacher.

        Six blocks are whole: the weights of one and of the next, each beside the buffer that it was gathered in, and
        the gradient of one beside the buffer that it leaves in.
        """
        whole = self.memory["activations"] + self.memory["buffers of the ops"]
        state = self.total - whole - self.memory["teacher"] + 4 * self.parameters  # the teacher is in float32
        return state // processes + 6 * self.block + whole


def step_cost(
    config: VisionTransformerConfig,
    batch: int,
    *,
    precision: str = "fp32",
    strategy: str = "object-single",
    classes: int = 1000,
    recompute: Recompute = False,
) -> Cost:
    """Run a step on tensors without data, and see what it allocates: no memory is taken, and no GPU is needed.

    Args:
        config: The model's architecture.
        batch: Images.
        precision: "fp32" or "bf16".
        strategy: Of a fixed number of patches, since no map is known here.
        classes: Outputs of the head.
        recompute: As `VisionTransformer.recompute`.

    Returns:
        The cost of the second step: the first has made the gradients.
    """
    complete_flop_counter()
    with FakeTensorMode():
        student = ImageClassifier(VisionTransformer(config), CosineClassifier(config.feature_dim, classes))
        teacher = VisionTransformer(config)
        method = CounterfactualDistiller(student, teacher, strategy).train()
        method.precision, student.transformer.recompute = precision, recompute
        if precision == "bf16":
            method.narrow_teacher()  # as the trainer does
        images = torch.empty(batch, config.image_size, config.image_size, 3, dtype=torch.uint8)
        labels = torch.zeros(batch, dtype=torch.int64)
        method.backward(images, labels)
        with FlopCounterMode(display=False) as counter:  # it keeps tensors, and so has a step of its own
            method.backward(images, labels)
        with _Live() as live:
            method.backward(images, labels)
        weights, frozen = _bytes(student), _bytes(teacher)
        block = max(_bytes(block) for block in student.transformer.blocks)
    memory = {
        "weights": weights, "gradients": weights, "optimiser state": 2 * weights, "teacher": frozen, **live.at_peak,
    }  # fmt: skip
    parameters = sum(p.numel() for p in student.backbone.parameters())
    return Cost(parameters, counter.get_total_flops(), memory, block)


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it and not yet gone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[str, int]] = {}
        self.now = {"activations": 0, "buffers of the ops": 0}
        self.at_peak = dict(self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        kind = "buffers of the ops" if func.namespace.startswith("maskcf") else "activations"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := _storage(tensor))._cdata not in given | self.seen.keys():
                self.seen[storage._cdata] = kind, storage.nbytes()
                self.now[kind] += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        if sum(self.now.values()) > sum(self.at_peak.values()):
            self.at_peak = dict(self.now)
        return out

    def _gone(self, key: int) -> None:
        kind, size = self.seen.pop(key)
        self.now[kind] -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def complete_flop_counter() -> None:
    """Tell the FLOP counter about what it does not know: the relevance kernels, and fused attention on a CPU."""
    aten = torch.ops.aten
    formulas: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
        torch.ops.maskcf.attention_relevance: relevance_flops,
        torch.ops.maskcf_triton.attention_relevance: relevance_flops,
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


def relevance_flops(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    """Two products of ``[Tq, d]`` and ``[d, T]`` per head; that a kernel forms one of them twice is its own affair."""
    n, heads, queries, width = q
    return 2 * 2 * n * heads * queries * k[2] * width


def forward_flops(config: VisionTransformerConfig) -> int:
    """F: products of one plain forward pass of one image, every token in every block."""
    t, w = config.prefix + config.num_patches, config.width
    mlp = (config.mlp_width or 4 * w) * (3 if config.gated_mlp else 2)
    embed = 2 * config.num_patches * w * 3 * config.patch_size**2
    projection = 0 if config.output_dim is None else 2 * w * config.output_dim
    return embed + config.depth * (2 * t * w * (4 * w + mlp) + 4 * t * t * w) + projection
