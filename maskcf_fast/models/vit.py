"""A compact CLIP vision transformer, split where counterfactual masking needs it.

``embed`` turns pixels into tokens, each patch alone; ``encode`` turns tokens into a feature. Between the two,
patches can be refilled or dropped without embedding them again.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.checks import check_tensor, value_checks
from ..core.precision import compute_dtype
from ..ops.drop import Packing
from ..ops.patchify import patchify
from .blocks import POINTWISE, Block, Tap, class_tokens
from .config import VisionTransformerConfig, preset
from .pool import AttentionPool, without_probe

OVERSHOOT = 0.2  # beyond [0, 1], as bicubic resizing of floats leaves it; normalised images lie further out


def check_pixels(images: Tensor) -> None:
    """Raise where float images are not in [0, 1], where their values may be read."""
    if not (value_checks(images) and images.numel()):
        return
    low, high = (float(x) for x in images.detach().aminmax())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise ValueError(
            f"float images must lie in [0, 1], got {low:.3g} to {high:.3g}: the model normalises them itself, so pass "
            "them before normalisation, and those in 0 to 255 as uint8 [N, S, S, 3] or divided by 255"
        )


# A block draws no random numbers: there is no state of a generator to keep, which a CUDA graph could not.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class VisionTransformer(nn.Module):
    """CLIP's vision transformer, SigLIP's, or a plain one: image → feature, not L2-normalised.

    Args:
        config: A `VisionTransformerConfig` or the name of a preset ("ViT-B/32", "ViT-B/16", "ViT-L/14",
            "ViT-L/14@336", "SigLIP-B/16", "tiny").

    Raises:
        ValueError: Unknown preset (the nearest is suggested).
    """

    def __init__(self, config: VisionTransformerConfig | str) -> None:
        super().__init__()
        self.config = config = preset(config) if isinstance(config, str) else config
        width, scale = config.width, config.width**-0.5
        patch_shape = (width, 3, config.patch_size, config.patch_size)
        self.patch_weight = nn.Parameter(torch.randn(patch_shape) * (3 * config.patch_size**2) ** -0.5)
        self.patch_bias = nn.Parameter(torch.zeros(width)) if config.patch_bias else None
        pooled = config.pool == "attention"
        self.class_embedding = None if pooled else nn.Parameter(torch.randn(width) * scale)
        positions = config.num_patches + (not pooled)  # the pool's probe has none
        self.position_embedding = nn.Parameter(torch.randn(positions, width) * scale)
        self.ln_pre = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_post = nn.LayerNorm(width, config.eps)
        self.pool = AttentionPool(config) if pooled else None
        self.projection = (
            None if config.output_dim is None else nn.Parameter(torch.randn(width, config.output_dim) * scale)
        )
        self.recompute = False  # activation checkpointing: keep each block's input, recompute the rest
        self._init_blocks()

    def _init_blocks(self) -> None:
        """CLIP's initialisation: residual branches shrink with the depth."""
        width, depth = self.config.width, self.config.depth
        for block in cast(list[Block], self.blocks):
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.out.weight, std=(2 * depth * width) ** -0.5)
            nn.init.normal_(block.fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.proj.weight, std=(2 * depth * width) ** -0.5)
            for linear in (block.attn.qkv, block.attn.out, block.fc, block.proj):
                nn.init.zeros_(linear.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Pixels to tokens, every patch alone: normalise, embed, add the position, first LayerNorm.

        Args:
            images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1], not normalised.

        Returns:
            Tokens ``[N, 1 + L, width]``, class token first, or in its place the attention pool's probe.

        Raises:
            ValueError: ``S`` is not the model's ``image_size``, or values far outside [0, 1] (read on the CPU only, or
                with ``MASKCF_DEBUG=1``).
        """
        return self.embed_rows(self.rows(images))

    def rows(self, images: Tensor) -> Tensor:
        """The first part of `embed`, which has no parameters: normalised patches ``[N, L, 3 * P * P]``."""
        config = self.config
        side = config.image_size
        if images.dtype == torch.uint8:
            check_tensor("images", images, ["N", side, side, 3])
        else:
            check_tensor("images", images, ["N", 3, side, side])
            if (*config.mean, *config.std) != (0, 0, 0, 1, 1, 1):  # else normalised images are what it takes
                check_pixels(images)
        dtype = compute_dtype(self.patch_weight)
        return patchify(images, config.patch_size, mean=config.mean, std=config.std, dtype=dtype)

    def embed_rows(self, rows: Tensor) -> Tensor:
        """The rest of `embed`."""
        patches = F.linear(rows, self.patch_weight.flatten(1), self.patch_bias)
        first = cast(Tensor, self.class_embedding) if self.pool is None else self.pool.probe
        first = first.to(patches.dtype).expand(patches.shape[0], 1, -1)
        if self.pool is not None:
            return torch.cat([first, self.ln_pre(patches + self.position_embedding).to(patches.dtype)], dim=1)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self.position_embedding).to(patches.dtype)

    def encode(
        self, tokens: Tensor, *, packing: Packing | None = None, record: bool = False
    ) -> tuple[Tensor, list[Tap]]:
        """Tokens to the feature. Where it is the class token's, the last block computes that alone.

        Args:
            tokens: ``[N, T, width]``, class token or probe first; any number of patches may have been left out. With
                ``packing``, rows ``[M, width]``.
            packing: Where the rows belong (`pack_tokens`).
            record: Whether to return the taps, for tokens that are not packed.

        Returns:
            The feature ``[N, D]``, and each layer's `Tap` (references to what attention computed anyway), the
            attention pool's `PoolTap` last, or none.
        """
        if record and torch.is_grad_enabled() and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_()  # frozen below: every layer's tap still has a gradient
        taps: list[Tap] = []
        last = len(self.blocks) - 1
        if self.pool is not None:  # the pool reads all patches
            last = -1
            probe = class_tokens(tokens, packing)
            tokens, packing = without_probe(tokens, packing)
        for layer, block in enumerate(self.blocks):
            inputs = (tokens, layer == last, packing)
            keep_all = not (self.recompute and torch.is_grad_enabled())
            tokens, tap = block(*inputs) if keep_all else recomputed(block, *inputs)
            if record:
                taps.append(tap)
            del tap  # else a layer's keys and values live on through the next
        if self.pool is None:
            feature = self.ln_post(tokens[:, 0])
        else:
            feature, pool_tap = self.pool(self.ln_post(tokens).to(tokens.dtype), probe, packing)
            if record:
                taps.append(pool_tap)
        return feature if self.projection is None else feature @ self.projection, taps

    def compile_pointwise(self, enabled: bool = True) -> None:
        """Compile what lies between the matrix products into one kernel each (or undo it).

        The products stay with the vendor's library, which a compiled block would call as well. And a compiled
        block's backward pass always forms the weights' gradients, of which a relevance map needs none.
        """
        if enabled:
            import torch._dynamo.config
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False  # the map's backward pass keeps the graph for the task's
            # With and without gradients, one image or many, one token or many, each dtype: more than the default 8.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        functions = [torch.compile(f, fullgraph=True) for f in POINTWISE] if enabled else POINTWISE
        for module in self.modules():
            if isinstance(module, Block | AttentionPool):
                module.pointwise = tuple(functions)

    def forward(self, images: Tensor) -> Tensor:
        """Images (as `embed` takes them) to features ``[N, D]``."""
        return self.encode(self.embed(images))[0]
