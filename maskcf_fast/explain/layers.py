"""Which of the recorded calls are the layers between the patches and a score, or why that cannot be said."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from ..core.errors import UserError
from .calls import Call, Calls

FUSED = (
    "timm: timm.layers.set_fused_attn(True) before the model is built, and TIMM_FUSED_ATTN unset; Hugging Face: "
    'attn_implementation="sdpa" and no output_attentions=True'
)
ONE_BRANCH = "only a chain of layers, each attending to what the one before made, can be explained"


def select_layers(record: Calls, logits: Tensor) -> list[Call]:
    """The self-attention calls that lead to ``logits [N, C]``, first layer first.

    Calls of other forward passes, or made without gradients, are left out, and so are calls with a mask or of another
    batch, as text encoders make them, as long as others do not depend on them nor they on others. A call with one query
    may come last: a class token that asks alone, or attention pooling.

    Raises:
        RuntimeError: ``logits`` carry no gradient.
        ValueError: As `AttentionRecord.relevance`.
    """
    if not record.calls:
        raise UserError(_nothing_recorded(record))
    if logits.grad_fn is None or all(call.edge is None for call in record.calls):
        raise RuntimeError(
            "the relevance map needs gradients: compute the logits inside record_attention() with gradients enabled, "
            "not under torch.no_grad(), torch.inference_mode() or re-entrant activation checkpointing, and do not "
            "detach them"
        )
    reached = graph_levels(logits.grad_fn, ())
    calls = [call for call in record.calls if call.edge is not None and call.node in reached]
    if not calls:
        raise UserError("the logits do not depend on any recorded attention call: were they computed in the context?")
    layers = _one_stream(calls, len(logits))
    _refuse_incomplete(record, layers)
    if any(node in reached for node in record.weights):
        raise UserError(
            "the score depends on attention weights themselves, which torch.nn.MultiheadAttention was asked for "
            f"(need_weights=True): {ONE_BRANCH}"
        )

    # A call's level counts the calls below it on the longest path, so a chain has the levels 1, 2, …; calls side
    # by side share one.
    levels = graph_levels(logits.grad_fn, {call.node for call in layers})
    left = [call for call in calls if call not in layers]
    below = graph_levels(logits.grad_fn, {call.node for call in left})
    between = [call for call in left if levels[call.node]] + [call for call in layers if below[call.node]]
    if between:  # a text encoder lies beside the layers
        shapes = sorted({tuple(call.q.shape) for call in left})
        raise UserError(
            f"attention calls with queries {shapes} lie between those over all tokens of an image: windowed attention, "
            "or heads or frames folded into the batch, cannot be explained"
        )
    order = sorted(layers, key=lambda call: levels[call.node])
    if [levels[call.node] for call in order] != list(range(1, len(order) + 1)):
        raise UserError(
            f"the score depends on attention calls side by side (parallel branches, differential attention, or "
            f"several forward passes of the same shape): {ONE_BRANCH}"
        )
    return order


def graph_levels(root: Node, counted: Collection[Node]) -> dict[Node, int]:
    """For each node that ``root`` depends on, the most ``counted`` nodes on a path that ends in it, itself included."""
    level: dict[Node, int] = {}
    stack = [(root, False)]
    while stack:
        node, inputs_done = stack.pop()
        inputs = [below for below, _ in node.next_functions if below is not None]
        if inputs_done:
            level[node] = max((level[below] for below in inputs), default=0) + (node in counted)
        elif node not in level:
            stack.append((node, True))
            stack += [(below, False) for below in inputs if below not in level]
    return level


def _one_stream(calls: Sequence[Call], n: int) -> list[Call]:
    """The calls on one sequence of tokens of ``n`` images."""
    batch = [call for call in calls if call.q.ndim == 4 and call.q.shape[0] == n]
    if not batch:
        shapes = sorted({tuple(call.q.shape) for call in calls})
        raise UserError(
            f"no attention call has {n} rows, as the logits have, but query shapes {shapes}: windowed attention, or "
            f"heads or frames folded into the batch, cannot be explained"
        )
    plain = [call for call in batch if not call.masked]
    if not plain:
        raise UserError(
            "attention runs with a mask, a position bias or causally: only attention over all tokens can be explained"
        )
    lengths = sorted({call.k.shape[2] for call in plain})
    if len(lengths) > 1:
        raise UserError(
            f"attention calls over sequences of different lengths {lengths} lead to the score. Hierarchical models, "
            f"whose tokens change between layers, and attention pooling over other tokens than those of the layers "
            f"cannot be explained. If one length belongs to a text encoder, compute the text features before, under "
            f"torch.no_grad()"
        )
    t = lengths[0]
    if any(call.masked and call.k.shape[2] == t for call in batch):
        raise UserError(
            f"some of the attention calls over {t} tokens run with a mask or position bias: only attention over all "
            f"tokens can be explained"
        )
    queries = [call.q.shape[2] for call in plain]
    if any(tq != t for tq in queries[:-1]) or queries[-1] not in (1, t) or queries[0] != t:
        raise UserError(
            f"cross-attention leads to the score ({queries} queries to {t} keys): only self-attention, and one last "
            f"call with a single query, can be explained"
        )
    return plain


def _refuse_incomplete(record: Calls, layers: Sequence[Call]) -> None:
    """Raise where a layer is missing or was not what its inputs say."""
    n, t = layers[0].q.shape[0], layers[0].k.shape[2]
    written = [shape for shape in record.maps if shape[-1] == t and shape[:-2].numel() % n == 0]
    if written:
        raise UserError(
            f"{len(written)} attention maps over the same {t} tokens were computed by an explicit softmax, so layers "
            f"are missing from the record. Switch fused attention on. {FUSED}"
        )
    until = record.calls.index(layers[-1])
    lost = [c for c in record.calls[:until] if c.q.shape == layers[0].q.shape and not c.masked and c not in layers]
    if record.one_pass and lost:
        raise UserError(
            f"{len(lost)} of {len(lost) + len(layers)} layers are cut off from the score, by torch.no_grad() or "
            "detach() within the model: only with record_attention() the layers above can be explained alone"
        )
    rates = {call.dropout for call in layers if call.dropout > 0}
    if rates:
        raise UserError(
            f"attention runs with dropout {max(rates)}, whose draw is not known: call model.eval(), or set the "
            f"attention dropout to 0"
        )


def _nothing_recorded(record: Calls) -> str:
    if record.maps:
        return (
            f"no attention call was recorded: the model computes attention by an explicit softmax ({len(record.maps)} "
            f"maps were seen). Switch fused attention on. {FUSED}"
        )
    return (
        "no attention call was recorded. A model that has none, such as a convolutional network, cannot be explained. "
        "Of another: call the model inside record_attention(), in the same thread and not "
        "scripted. Only torch's scaled_dot_product_attention is seen: "
        'switch flash_attn, xformers or flex_attention off (Hugging Face: attn_implementation="sdpa")'
    )
