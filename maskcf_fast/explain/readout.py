"""From the layers to a map: the read-out that the recurrence starts from, and the patches that it ends in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import FLOATS, check_tensor
from ..core.errors import UserError
from ..ops.relevance import carried
from .calls import Call

ReadOut = Literal["class", "mean", "class+mean", "attention"]


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise unless ``labels`` choose a column of ``logits`` per row."""
    check_tensor("logits", logits, ["N", "C"], dtypes=FLOATS)
    check_tensor("labels", labels, [len(logits)], dtypes=[torch.int64], device=logits.device)
    if len(labels) == 0:
        raise UserError("logits are empty: there is no image to explain")
    low, high = (int(x) for x in torch.stack(labels.aminmax()).tolist())
    if low < 0 or high >= logits.shape[1]:
        raise UserError(f"labels must lie in [0, {logits.shape[1] - 1}], got {low} to {high}")


class Ambiguous(UserError):
    """What a model shows has several readings, for this ``reason``, of which an argument of `explain` chooses one."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {remedy}")


def count_prefix(first: Call, prefix_tokens: int | None) -> tuple[int, tuple[int, int] | None]:
    """Tokens before the patches, and rows and columns of the patches (None if unknown)."""
    n, t = first.q.shape[0], first.k.shape[2]
    if prefix_tokens is not None and not 0 <= prefix_tokens < t:
        raise UserError(f"prefix_tokens must lie in [0, {t - 1}], got {prefix_tokens}")
    if first.grid is not None and first.grid[0] == n:
        _, rows, columns = first.grid
        prefix = t - rows * columns if prefix_tokens is None else prefix_tokens
        if t - prefix != rows * columns or not 0 <= prefix < 64:
            raise UserError(
                f"the last convolution made {rows}×{columns} patches, but the first layer sees {t} tokens, of which "
                f"{prefix_tokens if prefix_tokens is not None else 'an unknown number'} come before the patches: where "
                "a patch lies in the image is not known. Patch dropout is off after model.eval(); models that merge "
                "patches cannot be explained"
            )
        return prefix, (rows, columns)
    prefix = 1 if prefix_tokens is None else prefix_tokens  # no convolution: a square of patches
    side = math.isqrt(t - prefix)
    grid = (side, side) if side and side**2 == t - prefix else None
    if grid is None and prefix_tokens is None:
        raise Ambiguous(
            f"which of the {t} tokens are patches is not known", "pass prefix_tokens, the number of tokens before them"
        )
    return prefix, grid


def chain_relevance(
    layers: Sequence[Call],
    logits: Tensor,
    labels: Tensor,
    start_layer: int,
    prefix: int,
    readout: ReadOut | Tensor | None,
) -> Tensor:
    """The recurrence, ``[N, L]``; arguments as `AttentionRecord.relevance`."""
    if isinstance(readout, str) and readout not in get_args(ReadOut):
        raise UserError(f"readout must be one of {', '.join(get_args(ReadOut))}, or weights, got {readout!r}")
    pooled = readout == "attention"
    if pooled and layers[-1].q.shape[2] == layers[-1].k.shape[2]:
        raise UserError('readout="attention" needs a last fused attention call with one query, and none was recorded')
    depth = len(layers) - pooled
    if not isinstance(start_layer, int) or not -depth <= start_layer < depth:
        raise UserError(f"start_layer must be an int in [{-depth}, {depth - 1}], got {start_layer}")
    used = layers[start_layer % depth :]

    score = logits.gather(1, labels[:, None]).sum()
    edges = [call.edge for call in used if call.edge is not None]
    grads = torch.autograd.grad(score, edges, retain_graph=True, allow_unused=True)
    if any(grad is None for grad in grads):
        raise UserError(
            "no gradient reaches an attention call: what follows it has no derivative, as a quantised layer has none; "
            "explain the model before it is quantised"
        )
    start = start_weights(layers[-1], grads[-1], prefix, readout)  # [T]

    def steps() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float | None]]:
        for call, grad in zip(reversed(used), reversed(grads), strict=True):
            # Each query's head has keys and values of its own.
            k, v = (x.repeat_interleave(call.q.shape[1] // x.shape[1], dim=1) for x in (call.k, call.v))
            rows = slice(1 if call is layers[-1] and readout == "class" else None)  # the row is zero elsewhere
            yield call.q[:, :, rows], k, v, grad[:, :, rows], call.scale

    return carried(steps(), None if pooled else start)[:, prefix:]


def start_weights(last: Call, grad: Tensor, prefix: int, readout: ReadOut | Tensor | None) -> Tensor:
    """Weights ``[T]`` float32 or float64 by which the read-out takes the last layer's tokens."""
    t = last.k.shape[2]
    start = torch.zeros(t, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
    if isinstance(readout, Tensor):
        check_tensor("readout", readout, [t], dtypes=FLOATS, device=grad.device)
        return readout.to(start.dtype)
    if last.q.shape[2] == 1 and t > 1:
        if readout not in ("class", "attention"):
            raise Ambiguous(
                "the last attention call has a single query",
                'pass readout="class" if it is the class token\'s, or readout="attention" if it is a learned query '
                "that pools the tokens",
            )
        start[0] = 1  # the only query
        return start
    if readout in ("class", "class+mean"):
        if prefix == 0:
            raise UserError(f'readout="{readout}" needs a class token, but all {t} tokens are patches')
        start[0] = 1
        if readout == "class+mean":
            start[prefix:] = 1 / (t - prefix)
        return start

    # After the last attention every token is on its own, so the gradient there is zero, exactly, at tokens that
    # the score does not read.
    read = torch.any(grad, dim=(0, 1, 3))  # [T]
    patches, prefixes = int(read[prefix:].sum()), int(read[:prefix].sum())
    if readout == "mean":
        if patches not in (0, t - prefix) or prefixes not in (0, prefix) or (prefixes and not patches):
            raise UserError(
                f"the score reads {patches} of {t - prefix} patches and {prefixes} of {prefix} tokens before them: "
                f'not the mean of either, as readout="mean" says'
            )
        start[0 if prefixes else prefix :] = 1
    elif patches:
        if not torch.isfinite(grad).all():
            raise UserError("the gradient holds NaN or infinity: look for them in the images and the model's weights")
        raise Ambiguous(
            f"the score reads {patches} of {t - prefix} patches after the last layer, and {prefixes} of {prefix} "
            "tokens before them, not the class token alone",
            'if it reads their mean, pass readout="mean"; the mean beside the class token, readout="class+mean"; '
            "attention pooling that is not fused is not covered",
        )
    elif prefixes:
        start[:prefix] = read[:prefix]
    return start / start.sum().clamp(min=1)
