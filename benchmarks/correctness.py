"""Before anything is timed: every op against its reference, and the whole step against the paper's order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from maskcf_fast.methods import Draw, MaskStrategy, StepOutput
from maskcf_fast.methods.paper_order import plain_forward
from maskcf_fast.models import preset

from .cases import CASES, make_case
from .ops import MODULES, candidates, compare, first_line
from .workload import STRATEGIES, Unavailable, Variant, Workload

EXACT = 1e-5  # of the largest value: float32 against float32
ROUNDED = 5e-2  # of the norm: bfloat16 against float32
COMPILED = ("object-single", "random-single")  # strategies that are timed compiled: compiling takes a while
EDGE = 1e-4  # a score this close to the threshold may fall on either side

Row = dict[str, Any]


def measure(
    device: torch.device,
    arch: str = "tiny",
    batch: int = 8,
    runs: Sequence[str] = ("eager", "compiled", "graphed"),
    seconds: float = 600.0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Check everything.

    Args:
        device: Where; TF32 is off meanwhile.
        arch: Preset that the checks use.
        batch: Images.
        runs: Of the step.
        seconds: After these, nothing is compiled any more, and what would be is not checked.
        progress: Called with a line before each part.

    Returns:
        Rows ``what``, ``status`` (``"ok"``, ``"FAILED: …"``, ``"not checked: …"`` or ``"not available: …"``)
        and, for a step, the fields of
        its `Variant`.
    """
    end = time.perf_counter() + seconds
    with exact_products():
        progress("correctness: ops")
        rows = list(_ops(device, arch, batch))
        work = Workload(preset(arch), batch, device)
        for name in STRATEGIES:
            progress(f"correctness: {name}")
            rows += _steps(work, name, runs if name in COMPILED else ("eager",), end)
        for name in ("FT", "FD"):
            rows += _plain(work, name)
    return rows


def failure(rows: Sequence[Row], variant: Variant) -> str | None:
    """What failed for a variant, or that it was not checked: it must not have a speed-up.

    A failed op fails whatever uses the ops. The paper's order in eager mode is what the others are held against.
    """
    checked = variant.order == "paper" and variant.run == "eager"
    for row in rows:
        checked |= (
            not row["status"].startswith("not")
            and "op" not in row
            and all(row[field] == getattr(variant, field) for field in Variant._fields)
        )
        if row["status"].startswith("FAILED"):
            concerned = variant.order != "paper" if "op" in row else all(
                row[field] == getattr(variant, field) for field in Variant._fields
            )  # fmt: skip
            if concerned:
                return f"{row['status']} ({row['what']})"
    return None if checked else "not checked"


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def _ops(device: torch.device, arch: str, batch: int) -> Iterator[Row]:
    for op, case in CASES:
        made = make_case(op, case, arch, batch, device)
        expected = made.expected()
        for impl, function in candidates(made, device, compiled=False).items():
            if impl not in MODULES or isinstance(function, str):
                continue
            try:
                status = compare(made.call(function), expected, made.tolerance)
            except Exception as error:  # the other checks are still worth having
                status = f"FAILED: {type(error).__name__}: {first_line(error)}"
            yield {"what": f"{op}, {case}: {impl} against the reference", "op": op, "status": status}


def _steps(work: Workload, name: str, runs: Sequence[str], end: float) -> Iterator[Row]:
    """Every variant of a strategy's step, float32 eager against the paper's order, the others against that."""
    draw = work.draw(MaskStrategy.from_name(name))
    paper = Variant(name, "paper")
    expected = gradients(work, work.backward(paper), draw)
    # The same patches masked in all: one score at the threshold must not make two different steps of them.
    fixed = Draw(draw.donors, expected[0].mask)
    for run in runs:
        for precision in ("fp32", "bf16"):
            if run == "compiled":
                torch.compiler.reset()  # each shape is the first: no limit on recompilations
            for order in ("two passes", "one graph", "paper"):
                variant = Variant(name, order, run, precision)
                if order == "paper" and (run, name, precision) != ("compiled", COMPILED[0], "fp32"):
                    continue
                if run == "graphed":  # draws for itself while it is captured: held against eager by the trainer's tests
                    if order != "two passes":
                        continue
                    yield _row(variant, _graphed(work, variant))
                    continue
                if run == "compiled" and time.perf_counter() > end:
                    yield _row(variant, "not checked: the time was over")
                    continue
                try:
                    status = _compare(gradients(work, work.backward(variant), fixed), expected, variant)
                    if status == "ok" and variant == Variant(name):
                        status = _mask(work, variant, draw, expected[0])
                except Unavailable as reason:
                    status = f"not available: {reason}"
                except Exception as error:
                    status = f"FAILED: {type(error).__name__}: {first_line(error)}"
                yield _row(variant, status)


def _plain(work: Workload, name: str) -> Iterator[Row]:
    """Methods without masks, against the same written plainly."""

    def plain(**_: object) -> StepOutput:
        feature = plain_forward(work.student.backbone, work.pixels)[0]
        loss = torch.nn.functional.cross_entropy(work.student.head(feature), work.labels)
        if name == "FD":
            with torch.no_grad():
                target = plain_forward(work.teacher, work.pixels)[0]
            loss = loss + 30.0 * (feature - target).square().mean()
        loss.backward()
        return StepOutput(loss, loss, loss, loss)

    expected = gradients(work, plain)
    for precision in ("fp32", "bf16"):
        variant = Variant(name, precision=precision)
        try:
            status = _compare(gradients(work, work.backward(variant)), expected, variant)
        except Exception as error:
            status = f"FAILED: {type(error).__name__}: {first_line(error)}"
        yield _row(variant, status)


def gradients(
    work: Workload, backward: Callable[..., StepOutput], draw: Draw | None = None
) -> tuple[StepOutput, list[Tensor]]:
    """A step's losses and map, and every parameter's gradient."""
    work.optimizer.zero_grad(set_to_none=True)
    out = backward(draw=draw) if draw is not None else backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in work.parameters]
    work.optimizer.zero_grad(set_to_none=True)
    return out._replace(loss=out.loss.detach()), grads


def _graphed(work: Workload, variant: Variant) -> str:
    """A replayed graph against the same step run eagerly with the same random numbers."""
    try:
        graphed = work.backward(variant)
        gradients(work, graphed)  # captures
        state = work.generator.get_state()
        have = gradients(work, graphed)
        work.generator.set_state(state)
        eager = variant._replace(run="eager")
        return _compare(have, gradients(work, work.backward(eager)), variant._replace(precision="fp32"), loose=1e-2)
    except Unavailable as reason:
        return f"not available: {reason}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {first_line(error)}"


def _compare(
    have: tuple[StepOutput, list[Tensor]],
    want: tuple[StepOutput, list[Tensor]],
    variant: Variant,
    loose: float | None = None,
) -> str:
    exact = variant.precision == "fp32"
    allowed = loose or (EXACT if exact else ROUNDED)
    pairs = {"loss": (have[0].loss, want[0].loss), "map": (have[0].cam, want[0].cam)}
    if exact and loose is None:
        pairs |= {f"gradient {i}": pair for i, pair in enumerate(zip(have[1], want[1], strict=True))}
    else:  # a small gradient is all rounding: the whole is what the optimiser sees
        pairs["gradient"] = tuple(torch.cat([g.flatten() for g in side]) for side in (have[1], want[1]))  # type: ignore[assignment]
    for what, (ours, theirs) in pairs.items():
        if ours is None or theirs is None:
            continue
        difference, size = (ours - theirs).float(), theirs.float()
        if exact and loose is None:
            error = float(difference.abs().amax() / size.abs().amax().clamp(min=1e-12))
        else:
            error = float(difference.norm() / size.norm().clamp(min=1e-12))
        if not error <= allowed:  # NaN is no number to pass
            return f"FAILED: {what} is off by {error:.1e}, {allowed:.0e} is allowed"
    return "ok"


def _mask(work: Workload, variant: Variant, draw: Draw, expected: StepOutput) -> str:
    """The patches that the step selects by itself, but for scores at the threshold."""
    found = gradients(work, work.backward(variant), draw)[0]
    assert found.mask is not None
    assert expected.mask is not None
    differs = found.mask ^ expected.mask
    if not bool(differs.any()):
        return "ok"
    threshold = MaskStrategy.from_name(variant.method).threshold
    assert expected.cam is not None
    assert threshold is not None
    score = expected.cam / (expected.cam.amax(dim=1, keepdim=True) + 1e-8)
    if bool(((score - threshold).abs()[differs] <= EDGE).all()):
        return "ok"
    return f"FAILED: {int(differs.sum())} patches are selected differently"


def _row(variant: Variant, status: str) -> Row:
    return {"what": f"step, {variant}"} | variant._asdict() | {"status": status}
