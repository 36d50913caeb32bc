"""What is timed is checked first, in the precision it is timed in.

Eager variants are held against the paper's order in float32, on a few images and layers of the same model. A compiled
one is held against the same in eager mode, at its own size and on the mask that was selected there; a graph against the
very kernels that it replays, with the same random numbers and mask: what is left is rounding. The ops and the step on
every shape and dtype are the tests' affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskcf_fast.methods import MaskStrategy, StepOutput
from maskcf_fast.methods.losses import task_loss
from maskcf_fast.methods.paper_order import plain_forward
from maskcf_fast.models import VisionTransformerConfig

from .measure import first_line
from .workload import Backward, Unavailable, Variant, Workload

# Against the paper's order in float32, of the largest value; for lower precisions of the norm of all gradients.
PAPER = {"fp32": 5e-5, "tf32": 2e-2, "bf16": 3e-2}
# One precision computed in two ways, the mask given. In bfloat16 a change in the last bit of float32 anywhere grows to
# 0.8 % of the gradient over 12 layers (ViT-B/32), and no further; a patch selected differently makes 2 to 3 %.
SAME = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 2e-2}
DETERMINISTIC = 1e-6  # a graph against its kernels, where two runs of those agree; else 3 times as much as they differ
SMALL = {"cpu": 2, "cuda": 8}  # images
DEPTH = 4  # the first layer, the last, and two between
EDGE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 2e-2}  # a score this close to the threshold may fall on either side


class Result(NamedTuple):
    """Of one step: what it returned, and every parameter's gradient."""

    out: StepOutput
    grads: list[Tensor]


def gradients(work: Workload, backward: Backward, **given: Any) -> Result:
    """One step from no gradients; none are left."""
    work.optimizer.zero_grad(set_to_none=True)
    out = backward(**given)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in work.parameters]
    work.optimizer.zero_grad(set_to_none=True)
    kept: dict[str, Any] = {name: None if x is None else x.detach().clone() for name, x in out._asdict().items()}
    return Result(StepOutput(**kept), grads)  # copies: a graph writes to its own again


def against_paper(
    config: VisionTransformerConfig, device: torch.device, variants: Sequence[Variant]
) -> dict[Variant, str]:
    """``"ok"`` or what is wrong, for eager variants; `Variant.paper` in float32 is what they are held against."""
    work = Workload(replace(config, depth=min(config.depth, DEPTH)), SMALL[device.type], device)
    found: dict[Variant, str] = {}
    for name in dict.fromkeys(variant.method for variant in variants):
        base = Variant(name).paper()
        draw = {"draw": work.draw(base)} if base.masked else {}
        want = gradients(work, work.backward(base) if base.masked else _plain(work, name), **draw)
        for variant in (v for v in variants if v.method == name):
            status = "ok"
            if variant != base:
                status = _tried(_one, work, variant, want, draw)
            found[variant] = status
    return found


def _one(work: Workload, variant: Variant, want: Result, draw: dict[str, Any]) -> str:
    """The step on the paper order's own mask; then the patches that it selects by itself."""
    backward = work.backward(variant)
    given = draw | ({"mask": want.out.mask} if draw else {})
    status = compare(gradients(work, backward, **given), want, PAPER[variant.precision], variant.precision == "fp32")
    if status != "ok" or not draw:
        return status
    return _selection(gradients(work, backward, **draw).out, want.out, variant)


def _selection(have: StepOutput, want: StepOutput, variant: Variant) -> str:
    """The map, and the patches selected but for scores at the threshold."""
    assert have.mask is not None
    assert want.mask is not None
    differs = have.mask ^ want.mask
    if have.cam is not None and want.cam is not None:
        status = _within("map", [have.cam], [want.cam], PAPER[variant.precision], variant.precision == "fp32")
        score = want.cam / (want.cam.amax(dim=1, keepdim=True) + 1e-8)
        threshold = MaskStrategy.from_name(variant.method).threshold
        if status != "ok" or threshold is None:
            return status
        differs = differs & ((score - threshold).abs() > EDGE[variant.precision])
    return "ok" if not bool(differs.any()) else f"FAILED: {int(differs.sum())} patches are selected differently"


def against_eager(work: Workload, variant: Variant) -> str:
    """A compiled variant against the same in eager mode, on the mask selected there."""
    return _tried(_against_eager, work, variant)


def _against_eager(work: Workload, variant: Variant) -> str:
    given: dict[str, Any] = {"draw": work.draw(variant)} if variant.masked else {}
    eager = work.backward(variant._replace(run="eager"))
    want = gradients(work, eager, **given)
    if variant.masked:
        given["mask"] = want.out.mask
    return compare(gradients(work, work.backward(variant), **given), want, SAME[variant.precision])


def graph_against_kernels(work: Workload, variant: Variant, graphed: Backward) -> str:
    """A graph's replay against the kernels that it was captured from, with the same random numbers and mask."""
    return _tried(_graph_against_kernels, work, variant, graphed)


def _graph_against_kernels(work: Workload, variant: Variant, graphed: Backward) -> str:
    gradients(work, graphed)  # captures
    state = work.generator.get_state()
    have = gradients(work, graphed)
    work.generator.set_state(state)
    given = {"draw": work.draw(variant), "mask": have.out.mask} if variant.masked else {}
    kernels = work.backward(variant._replace(run="compiled"))
    want, again = (gradients(work, kernels, **given) for _ in range(2))
    status = compare(have, want, max(DETERMINISTIC, 3 * difference(again.grads, want.grads)))
    if status != "ok" or have.out.cam is None:
        return status
    del given["mask"]
    return _selection(have.out, gradients(work, kernels, **given).out, variant)


def _tried(check: Any, *arguments: Any) -> str:
    try:
        return check(*arguments)
    except Unavailable as reason:
        return f"not available: {reason}"
    except Exception as error:  # the others are still worth having
        return f"FAILED: {type(error).__name__}: {first_line(error)}"


def _plain(work: Workload, name: str) -> Backward:
    """FT and FD, written plainly."""

    def run() -> StepOutput:
        feature = plain_forward(work.student.backbone, work.pixels)[0]
        loss = task_loss(work.student.head(feature), work.labels)
        if name == "FD":
            with torch.no_grad():
                target = plain_forward(work.teacher, work.pixels)[0]
            loss = loss + 30.0 * (feature - target).square().mean()
        loss.backward()
        return StepOutput(loss, loss, loss, loss)

    return run


def compare(have: Result, want: Result, allowed: float, each: bool = False) -> str:
    """Losses and gradients: ``each`` by its largest value, or all by their norm.

    A small gradient in low precision is all rounding: the whole is what the optimiser sees.
    """
    sides = have.grads, want.grads
    pairs = [("loss", [have.out.loss], [want.out.loss])]
    if each:
        pairs += [(f"gradient {i}", [ours], [theirs]) for i, (ours, theirs) in enumerate(zip(*sides, strict=True))]
    else:
        pairs.append(("gradient", *sides))
    return next((status for pair in pairs if (status := _within(*pair, allowed, each)) != "ok"), "ok")


def difference(have: Sequence[Tensor], want: Sequence[Tensor], largest: bool = False) -> float:
    """Of several tensors together, relative: by the norm, or by the largest value."""
    ours, theirs = (torch.cat([x.flatten().float() for x in side]) for side in (have, want))
    error, scale = (x.abs().amax() if largest else x.norm() for x in (ours - theirs, theirs))
    return float(error / scale.clamp(min=1e-12))


def _within(what: str, have: Sequence[Tensor], want: Sequence[Tensor], allowed: float, largest: bool) -> str:
    error = difference(have, want, largest)
    if not error <= allowed:  # NaN is no number to pass
        return f"FAILED: {what} is off by {error:.1e}, {allowed:.0e} is allowed"
    return "ok"
