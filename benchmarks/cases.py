"""The calls that the benchmark of the ops times: each op at the sizes of CLIP's vision transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import maskcf_fast as mf
from maskcf_fast.models import PRESETS, VisionTransformerConfig

from . import baselines

SIZES = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336")
THRESHOLD = 0.3  # the paper's
EXACT = 0.0


@dataclass(frozen=True)
class Case:
    """One op with its arguments, and what else computes the same."""

    op: partial[Any]  # a public function; takes the arguments, and ``impl``
    args: tuple[Tensor, ...]
    eager: Mapping[str, Callable[..., Any]]  # plain PyTorch by name, taking the arguments; the fastest form is "eager"
    tolerance: tuple[float, ...]  # per result: greatest difference from the reference, in parts of its largest value
    eager_tolerance: tuple[float, ...] = ()  # the same for plain PyTorch, where it rounds more
    grads: tuple[Tensor, ...] = ()  # of the results: the gradients of the first arguments are computed as well
    gradients: int = 1  # so many
    by_image: bool = False  # images do not meet: the reference may take a few at a time
    written_out: int = 0  # bytes that plain PyTorch takes on the way
    limits: tuple[Any, ...] = ()  # what an implementation may be limited in, as `why_not` takes it

    @property
    def package(self) -> str:
        """Package of the op, as `maskcf_fast.ops.dispatch` names it."""
        return self.op.func.__module__

    def call(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Results of ``function`` for the arguments: what is compared, timed, and counted as written."""
        out = function(*self.args)
        out = out if isinstance(out, tuple) else (out,)
        if not self.grads:
            return out
        return *(x.detach() for x in out), *torch.autograd.grad(out, self.args[: self.gradients], self.grads)

    def expected(self) -> tuple[Tensor, ...]:
        """Results of the reference."""
        run = partial(self.op, impl="reference")
        if not self.by_image:
            return self.call(run)
        return (torch.cat([run(*few) for few in zip(*(x.split(16) for x in self.args), strict=True)]),)

    def moved(self, results: tuple[Tensor, ...]) -> int:
        """Bytes that must move: every argument read once, every result written once."""
        tensors = {x.data_ptr(): x for x in (*self.args, *results, *self.grads)}  # one may be two arguments' gradient
        return sum(x.numel() * x.element_size() for x in tensors.values())


def random_cam(n: int, num_patches: int, device: torch.device) -> Tensor:  # [N, L] float32
    """No two patches of an image alike, so that every way to take the highest takes the same; a quarter above 0.3."""
    rank = torch.rand(n, num_patches, device=device).argsort(dim=1) + 1
    return (rank / num_patches) ** 4


def random_images(config: VisionTransformerConfig, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[N, 3, S, S]``."""
    shape = (n, 3, config.image_size, config.image_size)
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=dtype, device=device)
    return torch.rand(shape, device=device, dtype=dtype)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What a model runs in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def select_threshold(config: VisionTransformerConfig, n: int, device: torch.device) -> Case:
    op, eager = mf.select_patches, baselines.select_threshold
    cam = random_cam(n, config.num_patches, device)
    return Case(partial(op, threshold=THRESHOLD), (cam,), {"eager": partial(eager, threshold=THRESHOLD)}, (EXACT,))


def select_top_k(config: VisionTransformerConfig, n: int, device: torch.device) -> Case:
    op, eager, k = mf.select_patches, baselines.select_top_k, config.num_patches // 4
    cam = random_cam(n, config.num_patches, device)
    return Case(partial(op, top_k=k), (cam,), {"eager": partial(eager, k=k)}, (EXACT,))


def refill(config: VisionTransformerConfig, n: int, device: torch.device, dtype: torch.dtype, fill: str) -> Case:
    mask = random_cam(n, config.num_patches, device) > THRESHOLD
    donors = mf.sample_donors(n, config.num_patches if fill == "multi" else None, device=device)
    eager = {"paper": baselines.refill_blend, "eager": baselines.refill_where}
    images = random_images(config, n, device, dtype)
    return Case(partial(mf.refill_patches), (images, mask, donors), eager, (EXACT,))


def counterfactual(config: VisionTransformerConfig, n: int, device: torch.device, dtype: torch.dtype) -> Case:
    args = (
        random_images(config, n, device, dtype),
        random_cam(n, config.num_patches, device),
        mf.sample_donors(n, device=device),
    )
    eager = {
        name: partial(baselines.counterfactual, threshold=THRESHOLD, refill=refill)
        for name, refill in (("paper", baselines.refill_blend), ("eager", baselines.refill_where))
    }
    return Case(partial(mf.counterfactual_refill, threshold=THRESHOLD), args, eager, (EXACT, EXACT))


def patchify(config: VisionTransformerConfig, n: int, device: torch.device) -> Case:
    images = random_images(config, n, device, torch.uint8).permute(0, 2, 3, 1).contiguous()
    dtype = compute_dtype(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (config.mean, config.std))
    eager = partial(baselines.patchify, patch_size=config.patch_size, mean=mean, std=std, dtype=dtype)
    op = partial(mf.patchify, patch_size=config.patch_size, mean=config.mean, std=config.std, dtype=dtype)
    # PyTorch divides by multiplying on a GPU: the last bit of what is rounded may differ.
    return Case(op, (images,), {"eager": eager}, (1e-5 if dtype == torch.float32 else 1e-2,))


def gather(config: VisionTransformerConfig, n: int, device: torch.device, fill: str) -> Case:
    shape, dtype = (n, 1 + config.num_patches, config.width), compute_dtype(device)
    tokens = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    mask = random_cam(n, config.num_patches, device) > THRESHOLD
    donors = mf.sample_donors(n, config.num_patches if fill == "multi" else None, device=device)
    grad_out = torch.randn(shape, device=device, dtype=dtype)
    # The gradient of a donor is a sum, which PyTorch rounds to the dtype after every term.
    tolerance = (EXACT, 1e-5 if dtype == torch.float32 else 2e-2)
    return Case(
        partial(mf.gather_tokens),
        (tokens, mask, donors),
        {"eager": baselines.gather_tokens},
        tolerance,
        grads=(grad_out,),
    )


def bias_gelu(config: VisionTransformerConfig, n: int, device: torch.device, dtype: torch.dtype | None = None) -> Case:
    shape, dtype = (n, 1 + config.num_patches, 4 * config.width), dtype or compute_dtype(device)
    hidden = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    bias = torch.randn(shape[-1], device=device).requires_grad_()
    activation = config.activation
    # Plain PyTorch rounds the sum to the dtype before the function, and what it is made of after each step.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return Case(
        partial(mf.bias_gelu, activation=activation),
        (hidden, bias),
        {"eager": partial(baselines.bias_gelu, activation=activation)},
        (tolerance, tolerance, 1e-3 if dtype == torch.float32 else 2e-2),
        grads=(torch.randn(shape, device=device, dtype=dtype),),
        gradients=2,
    )


def residual_norm(
    config: VisionTransformerConfig, n: int, device: torch.device, dtype: torch.dtype | None = None
) -> Case:
    shape, dtype = (n, 1 + config.num_patches, config.width), dtype or compute_dtype(device)
    x, branch, *grads = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    weight, bias = (torch.rand(config.width, device=device).requires_grad_() for _ in range(2))
    # The weight's gradient is a sum of terms of both signs.
    tolerance, of_sums = (1e-5, 1e-3) if dtype == torch.float32 else (2e-2, 2e-2)
    return Case(
        partial(mf.residual_norm),
        (x.requires_grad_(), branch.requires_grad_(), weight, bias),
        {"eager": baselines.residual_norm},
        (EXACT, tolerance, tolerance, tolerance, of_sums, of_sums),
        (EXACT, tolerance, tolerance, tolerance, 5 * of_sums, 5 * of_sums),  # PyTorch adds them up in the dtype
        grads=tuple(grads),
        gradients=4,
    )


def relevance(
    config: VisionTransformerConfig,
    n: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    queries: int | None = None,
) -> Case:
    heads, t, dtype = config.heads, 1 + config.num_patches, dtype or compute_dtype(device)
    d = config.width // heads
    # In the layouts of a transformer: q, k, v from one projection, the gradient towards the output projection.
    q, k, v = torch.randn(n, t, 3, heads, d, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
    grad_out = torch.randn(n, t, heads, d, device=device, dtype=dtype).transpose(1, 2)
    q, grad_out = (x[:, :, :queries] for x in (q, grad_out))
    row = torch.rand(n, t, device=device)
    return Case(
        partial(mf.attention_relevance),
        (q, k, v, grad_out, row),
        {"eager": baselines.attention_relevance},
        (1e-5 if dtype == torch.float32 else 1e-4,),
        (1e-5 if dtype == torch.float32 else 5e-2,),  # the maps are in that dtype
        by_image=True,
        written_out=5 * n * heads * t * t * 4,
        limits=(dtype, d),
    )


# By op and case, the cheapest first.
CASES: dict[tuple[str, str], Callable[[VisionTransformerConfig, int, torch.device], Case]] = {
    ("select_patches", "threshold"): select_threshold,
    ("select_patches", "top-k"): select_top_k,
    ("refill_patches", "single-fill, uint8"): partial(refill, dtype=torch.uint8, fill="single"),
    ("refill_patches", "single-fill, float32"): partial(refill, dtype=torch.float32, fill="single"),
    ("refill_patches", "multi-fill, uint8"): partial(refill, dtype=torch.uint8, fill="multi"),
    ("refill_patches", "multi-fill, float32"): partial(refill, dtype=torch.float32, fill="multi"),
    ("counterfactual_refill", "threshold, uint8"): partial(counterfactual, dtype=torch.uint8),
    ("counterfactual_refill", "threshold, float32"): partial(counterfactual, dtype=torch.float32),
    ("patchify", "from uint8"): patchify,
    ("gather_tokens", "single-fill, forward and backward"): partial(gather, fill="single"),
    ("gather_tokens", "multi-fill, forward and backward"): partial(gather, fill="multi"),
    ("bias_gelu", "forward and backward"): bias_gelu,
    ("bias_gelu", "bf16, forward and backward"): partial(bias_gelu, dtype=torch.bfloat16),
    ("residual_norm", "forward and backward"): residual_norm,
    ("residual_norm", "bf16, forward and backward"): partial(residual_norm, dtype=torch.bfloat16),
    ("attention_relevance", "one layer"): relevance,
}
OPS = tuple(dict.fromkeys(op for op, _ in CASES))


def make_case(op: str, case: str, size: str, n: int, device: torch.device) -> Case:
    """A case of `CASES` with its arguments on the device; the same values at every call."""
    torch.manual_seed(0)
    return CASES[op, case](PRESETS[size], n, device)
