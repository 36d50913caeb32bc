"""A compact CLIP vision transformer, split where counterfactual masking needs it.

``embed`` turns pixels into tokens, each patch alone; ``encode`` turns tokens into a feature. Between the two,
patches can be refilled or dropped without embedding them again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import _saved_tensors_hooks_get_disabled_error_message
from torch.utils.checkpoint import checkpoint

from ..core.checks import check_tensor, value_checks
from ..core.errors import UserError
from ..core.precision import compute_dtype
from ..ops.drop import Packing
from ..ops.patchify import patchify
from .backbone import Backbone, Recompute
from .blocks import POINTWISE, Attention, Block, Tap, WithMlp
from .config import VisionTransformerConfig, preset
from .pool import AttentionPool, mean_pool
from .positions import Rotation, rotary_angles

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


class VisionTransformer(Backbone):
    """A vision transformer: image → feature, not L2-normalised.

    Args:
        config: A `VisionTransformerConfig` or the name of a preset ("ViT-B/32", "ViT-B/16", "ViT-L/14",
            "ViT-L/14@336", "SigLIP-B/16", "tiny").

    Raises:
        ValueError: Unknown preset (the nearest is suggested).
    """

    config: VisionTransformerConfig

    def __init__(self, config: VisionTransformerConfig | str) -> None:
        super().__init__()
        if not isinstance(config, str | VisionTransformerConfig):
            raise TypeError(f"config must be a VisionTransformerConfig or the name of a preset, got {config!r}")
        self.config = config = preset(config) if isinstance(config, str) else config
        width, scale = config.width, config.width**-0.5
        patch_shape = (width, 3, config.patch_size, config.patch_size)
        self.patch_weight = nn.Parameter(torch.randn(patch_shape) * (3 * config.patch_size**2) ** -0.5)
        self.patch_bias = nn.Parameter(torch.zeros(width)) if config.patch_bias else None
        self.class_embedding = nn.Parameter(torch.randn(width) * scale) if config.class_token else None
        self.registers = nn.Parameter(torch.randn(config.registers, width) * scale) if config.registers else None
        positions = 0 if config.positions == "none" else config.prefix_positions + config.num_patches
        self.position_embedding = nn.Parameter(torch.randn(positions, width) * scale) if positions else None
        self.ln_pre = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_post = nn.LayerNorm(width, config.eps)
        self.pool = AttentionPool(config) if config.pool == "attention" else None
        out = config.output_dim
        self.projection = None if out is None else nn.Parameter(torch.randn(width, out) * scale)
        self.projection_bias = nn.Parameter(torch.zeros(out)) if out and config.projection_bias else None
        self.recompute = False
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
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    @property
    def recompute(self) -> Recompute:
        """What the backward pass makes again instead of keeping it: nothing, or what lies within each block (activation
        checkpointing), or the results of GELU alone, a fifth of it at little cost."""
        return self._recompute

    @recompute.setter
    def recompute(self, what: Recompute) -> None:
        if what not in (False, True, "gelu"):
            raise ValueError(f"recompute must be False, True or 'gelu', got {what!r}")
        self._recompute = what if isinstance(what, str) else bool(what)
        for block in cast(list[Block], self.blocks):
            block.remake = what == "gelu"

    def embed(self, images: Tensor) -> Tensor:
        """Pixels to tokens, every patch alone: normalise, embed, add the position, first LayerNorm.

        Args:
            images: uint8 ``[N, S, S, 3]`` or float ``[N, 3, S, S]`` in [0, 1], not normalised.

        Returns:
            Tokens ``[N, T, width]``: the class token and the registers, if there are any, then the patches.

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
        tokens, positions, first = patches, self.position_embedding, self.config.prefix_positions
        if positions is not None:
            tokens = tokens + positions[first:]
        prefix = [] if self.class_embedding is None else [self.class_embedding[None]]
        if positions is not None and first:
            prefix = [prefix[0] + positions[:first]]
        if self.registers is not None:
            prefix.append(self.registers)
        if prefix:
            tokens = torch.cat([torch.cat(prefix).to(tokens.dtype).expand(rows.shape[0], -1, -1), tokens], dim=1)
        return self.ln_pre(tokens).to(patches.dtype)

    def angles(self) -> Tensor | None:
        """By how much each token of a whole image is turned (`rotary_angles`); None without rotary positions."""
        return rotary_angles(self.config, self.patch_weight.device)

    def encode(
        self,
        tokens: Tensor,
        *,
        packing: Packing | None = None,
        angles: Tensor | None = None,
        record: bool = False,
    ) -> tuple[Tensor, list[Tap]]:
        """Tokens to the feature. Where it is the class token's, the last block computes that alone.

        Args:
            tokens: ``[N, T, width]``, those before the patches first; any number of patches may have been left out.
                With ``packing``, rows ``[M, width]``.
            packing: Where the rows belong (`pack_tokens`).
            angles: Of the tokens, where patches have been left out of a model with rotary positions: those of `angles`
                that are left, in the shape of ``tokens`` but for the last dimension.
            record: Whether to return the taps, for tokens that are not packed.

        Returns:
            The feature ``[N, D]``, and each layer's `Tap` (references to what attention computed anyway), the
            attention pool's `PoolTap` last, or none.

        Raises:
            UserError: `recompute` is on where PyTorch cannot make again what it keeps, as in `torch.func.grad`.
        """
        if self.recompute and torch.is_grad_enabled() and (why := _saved_tensors_hooks_get_disabled_error_message()):
            raise UserError(f"recompute={self.recompute!r} cannot be had here: set model.recompute = False ({why})")
        if record and torch.is_grad_enabled() and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_()  # frozen below: every layer's tap still has a gradient
        taps: list[Tap] = []
        config, lost = self.config, None
        if packing is not None and not config.prefix:
            lost = ~packing.visible.any(dim=1)  # attention to nothing at all is not a number in some kernels
            packing = packing._replace(visible=packing.visible | lost[:, None])
        rotation = self._rotation(angles, packing)
        last = len(self.blocks) - 1 if config.pool == "class" else -1  # else all tokens are read
        branch: Tensor | None = None  # the last block's, which the next one's first norm adds
        for layer, block in enumerate(self.blocks):
            inputs = (tokens, branch, layer == last, packing, rotation)
            keep_all = not (self.recompute is True and torch.is_grad_enabled())
            tokens, branch, tap = block(*inputs) if keep_all else recomputed(block, *inputs)
            if record:
                taps.append(tap)
            del tap  # else a layer's keys and values live on through the next
        tokens = tokens if branch is None else tokens + branch
        if config.pool == "class":
            feature = self.ln_post(tokens[:, 0])
        elif config.pool == "mean" and config.pool_norm:
            feature = self.ln_post(mean_pool(tokens, config.prefix, packing, lost))
        else:
            tokens = self.ln_post(tokens).to(tokens.dtype)
            if self.pool is None:
                feature = mean_pool(tokens, config.prefix, packing, lost)
            else:
                feature, pool_tap = self.pool(tokens, packing, lost)
                if record:
                    taps.append(pool_tap)
        if self.projection is not None:
            feature = feature @ self.projection
            feature = feature if self.projection_bias is None else feature + self.projection_bias
        return feature, taps

    def _rotation(self, angles: Tensor | None, packing: Packing | None) -> Rotation | None:
        if self.config.rotary is None:
            return None
        # Made anew, in 0.07 ms: a cache would have to stay out of captures of CUDA graphs and of tensors without data.
        angles = cast(Tensor, self.angles()) if angles is None else angles
        angles = angles if packing is None else packing.pad(angles)
        angles = angles if angles.ndim == 2 else angles[:, None]  # of all heads
        return Rotation(angles.cos(), angles.sin(), self.config.rotary.halves)

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
        self.set_pointwise(tuple(torch.compile(f, fullgraph=True) for f in POINTWISE) if enabled else POINTWISE)

    def set_pointwise(self, functions: tuple[Callable[..., Any], ...]) -> None:
        """Take others in place of `POINTWISE`, in its order."""
        for module in self.modules():
            if isinstance(module, Attention | WithMlp):
                module.pointwise = functions
