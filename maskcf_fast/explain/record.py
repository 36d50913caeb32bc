"""Recording what fused attention consumed and produced, in any model, without touching the model.

A function mode sees every call of `torch.nn.functional.scaled_dot_product_attention` that is made in this thread
while it is on, however the caller got hold of the function. It needs no patching, so other threads, exceptions and
nested contexts need no care. It also switches off the inference fast paths of `torch.nn`, which call no such
function.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from .calls import Call, Calls
from .layers import select_layers
from .readout import ReadOut, chain_relevance, check_labels, count_prefix


class AttentionRecord(Calls):
    """The attention calls made inside `record_attention`, and the relevance that follows from them.

    It refers to each layer's queries, keys and values, which autograd keeps for the backward pass anyway.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grid: tuple[int, int] | None = None
        self.visible: Tensor | None = None  # [N, T] bool, the keys that attention over all tokens is to see
        self.mixed = False  # a convolution over several tokens after the first call
        self._last_convolution: tuple[int, int, int] | None = None
        self._paused = False

    def relevance(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        start_layer: int = 0,
        prefix_tokens: int | None = None,
        readout: ReadOut | Tensor | None = None,
    ) -> Tensor:
        """Relevance of every patch for each image's label (Chefer, Gur, Wolf, ICCV 2021).

        ``R <- R + A_l R`` over the layers, with ``A_l = mean over heads of max(0, P_l * dP_l)``, of which the row
        that the model reads out is returned. No map is formed: see `maskcf_fast.attention_relevance`. The graph of
        ``logits`` is kept, and parameters get no ``.grad``.

        The constant share of the patches in the read-out itself is left out, as the class token's own relevance
        is: a map says what attention brought from each patch to the read-out.

        Args:
            logits: ``[N, C]`` float, computed inside the context with gradients enabled.
            labels: int64 ``[N]``, the column of ``logits`` to explain.
            start_layer: First layer that counts, 0 for all; negative counts from the end, as in indexing.
            prefix_tokens: Tokens before the patches (class, distillation, registers). By default what the patch
                embedding's convolution leaves of the sequence.
            readout: What the score is computed from. None: the prefix tokens that the gradient reaches after the
                last layer, most often the class token; an error where it reaches patches. ``"class"``: the first
                token; ``"mean"``: the mean of the patches, or of all tokens; ``"class+mean"``: both, concatenated;
                ``"attention"``: pooling by a learned query (a last fused attention call of one query). Or weights
                ``[T]`` by which the tokens are summed.

        Returns:
            ``[N, L]`` float32 (float64 for a float64 model), in reading order, not normalised. `grid` then holds
            the rows and columns of the patches, where a convolution made them.

        Raises:
            RuntimeError: ``logits`` carry no gradient.
            ValueError: No attention was recorded, or it is not one that the recurrence covers (masks, dropout,
                windows, parallel branches, an unknown read-out); the message names the remedy. Bad labels.
        """
        check_labels(logits, labels)
        self._paused = True  # the formulas below and recomputed activations are no calls of the model
        try:
            device = logits.device.type
            with torch.inference_mode(False), torch.autocast(device, enabled=False), torch.enable_grad():
                layers = select_layers(self, logits)
                prefix, self.grid = count_prefix(layers[0], prefix_tokens)
                return chain_relevance(layers, logits, labels, start_layer, prefix, readout)
        finally:
            self._paused = False


@contextmanager
def record_attention() -> Iterator[AttentionRecord]:
    """Record the attention calls of any model, with its fused kernels left on.

        with record_attention() as record:
            logits = model(images)
        cam = record.relevance(logits, labels)

    Works in train and eval mode, and where no parameter requires gradients (the recorded outputs then start the
    graph). The model's results do not change, but for the rounding of a ``torch.nn.MultiheadAttention`` that is asked
    for its weights, which runs fused here. What ``torch.compile`` made runs uncompiled meanwhile.

    Yields:
        The record; its `relevance` may be called inside or after the context.
    """
    record = AttentionRecord()
    compiler = sys.modules.get("torch._dynamo")  # not loaded: nothing is compiled
    uncompiled = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
    with uncompiled, _Watch(record):
        yield record


class _Watch(TorchFunctionMode):
    def __init__(self, record: AttentionRecord) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        record = self.record
        if record._paused:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            call = func if record.visible is None else partial(_attend_to, record.visible)
            return _record_call(record, call(*args, **kwargs), *args, **kwargs)
        if func is F.multi_head_attention_forward:
            asked = kwargs.get("need_weights", True)
            with self:  # on again, for the calls inside
                out, _ = _OPEN_MULTI_HEAD(*args, **{**kwargs, "need_weights": False})
            weights = func(*args, **kwargs)[1] if asked else None  # by a softmax of its own, for whoever reads it
            if weights is not None and weights.grad_fn is not None:
                record.weights.append(weights.grad_fn)
            return out, weights
        result = func(*args, **kwargs)
        if func is F.conv2d and result.ndim == 4:
            record._last_convolution = (result.shape[0], result.shape[2], result.shape[3])
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            record.mixed |= bool(record.calls) and weight.shape[2:].numel() > 1
        elif func in _SOFTMAX and result.ndim >= 3 and result.shape[-1] == result.shape[-2]:
            record.maps.append(result.shape)
        return result


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _attend_to(
    visible: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Attention that sees some of the keys, where it is over all tokens."""
    mask = visible[:, None, None, :] if key.shape[2] == visible.shape[1] else attn_mask
    return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)


def _record_call(
    record: AttentionRecord,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Note a call and return its output, which is given a graph if it has none."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "attention cannot be recorded in a function that is being compiled: compile inside, if at all"
        )
    edge = None
    if torch.is_grad_enabled():
        if not out.requires_grad:
            out = out.detach().requires_grad_()  # nothing before asks for gradients: the graph starts here
        edge = get_gradient_edge(out)
    q, k, v = (x.detach().to(out.dtype) for x in (query, key, value))  # autocast narrows them inside the call
    record.calls.append(Call(q, k, v, attn_mask, dropout_p, is_causal, scale, out, edge, record._last_convolution))
    return out


def _open_multi_head() -> Callable[..., Any]:
    """`F.multi_head_attention_forward`, except that it does not hand itself to a mode as a whole.

    The copy runs the same code, under modes that see the attention call inside.
    """
    inner = F.multi_head_attention_forward
    names = {**inner.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__kwdefaults__ = inner.__kwdefaults__
    return copy


_OPEN_MULTI_HEAD = _open_multi_head()
