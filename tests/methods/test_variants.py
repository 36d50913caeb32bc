"""Every way to run a step is the paper's function: each method, in every precision, compiled, and as a CUDA graph.

`benchmarks.report` runs this for its device before it times anything.
"""

from contextlib import contextmanager

import pytest
import torch
from students import moved

from maskcf_fast.methods import (
    CounterfactualDistiller,
    FeatureDistillation,
    FineTuning,
    MaskStrategy,
    StepOutput,
    paper_order_step,
    strategy_names,
)
from maskcf_fast.methods.losses import task_loss
from maskcf_fast.methods.paper_order import plain_forward
from maskcf_fast.training import speed

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
METHODS = (*strategy_names(), "FT", "FD")
# Of the norm of all gradients: against float32, and of one precision computed in two ways, the mask given.
PAPER = {"fp32": 1e-5, "tf32": 2e-2, "bf16": 3e-2}
SAME = {"fp32": 1e-5, "bf16": 2e-2}
EDGE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 2e-2}  # a score this close to the threshold may fall on either side


class Step:
    """A student, its teacher and a batch on a device; gradients of a step in any order."""

    def __init__(self, device, name):
        student, teacher = moved(classes=10)
        self.teacher = teacher.backbone.to(device)
        self.student, self.name, self.device = student.to(device), name, torch.device(device)
        self.images = torch.rand(8, 3, 32, 32, device=device)
        self.labels = torch.randint(10, (8,), device=device)
        self.generator = torch.Generator(device).manual_seed(0)
        kinds = {"FT": lambda: FineTuning(self.student), "FD": lambda: FeatureDistillation(self.student, self.teacher)}
        masked = name not in kinds
        self.method = kinds.get(name, lambda: CounterfactualDistiller(self.student, self.teacher, name))()
        self.strategy = MaskStrategy.from_name(name) if masked else None
        self.draw = self.strategy.draw(8, 16, generator=self.generator, device=device) if masked else None

    def gradients(self, step):
        """What a step returns, detached, and all its gradients in one."""
        self.student.zero_grad(set_to_none=False)  # a graph writes to those that it was captured with
        out = step()
        kept = {key: None if x is None else x.detach().clone() for key, x in out._asdict().items()}
        return StepOutput(**kept), torch.cat([p.grad.flatten().clone() for p in self.student.parameters()])

    def paper(self):
        if self.strategy is not None:
            out = paper_order_step(self.student, self.teacher, self.strategy, self.images, self.labels, self.draw)
        else:
            feature = plain_forward(self.student.backbone, self.images)[0]
            loss = task_loss(self.student.head(feature), self.labels)
            if self.name == "FD":
                loss = loss + 30.0 * (feature - plain_forward(self.teacher, self.images)[0].detach()).square().mean()
            out = StepOutput(loss, loss, loss, loss)
        out.loss.backward()
        return out

    def fast(self, **given):
        if self.strategy is not None:
            given = {"draw": self.draw} | given
        return self.method.backward(self.images, self.labels, **given)


def error(have, want):
    return float((have - want).norm() / want.norm())


@contextmanager
def products_in(precision):
    """Float32 products on a GPU's matrix units, or as IEEE wants them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PAPER)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_the_papers_function_in_every_precision(name, precision, device):
    """The same loss and gradients on the paper's own mask; and its own mask but for scores at the threshold."""
    step = Step(device, name)
    want, gradients = step.gradients(step.paper)
    step.method.precision = "bf16" if precision == "bf16" else "fp32"
    with products_in(precision):
        out, found = step.gradients(lambda: step.fast(**({} if want.mask is None else {"mask": want.mask})))
        own = step.gradients(step.fast)[0]
    assert error(found, gradients) <= PAPER[precision]
    torch.testing.assert_close(out.loss, want.loss, rtol=PAPER[precision], atol=0)
    if want.mask is not None:
        differs = own.mask ^ want.mask
        if want.cam is not None:
            assert error(own.cam, want.cam) <= PAPER[precision]
            score = want.cam / want.cam.amax(dim=1, keepdim=True)
            differs &= (score - step.strategy.threshold).abs() > EDGE[precision]
        assert not differs.any()


@gpu
@pytest.mark.parametrize("precision", SAME)
@pytest.mark.parametrize("name", ["object-single", "random-single", "context-none"])
def test_compiled_is_eager_on_cuda(name, precision):
    """On a CPU, whose compiler takes half a minute for each: tests/training/test_speed.py."""
    step = Step("cuda", name)
    step.method.precision = precision
    want, gradients = step.gradients(step.fast)
    assert speed.compile_pointwise(step.method, step.device) is None
    out, found = step.gradients(lambda: step.fast(mask=want.mask))
    assert 0 < error(found, gradients) <= SAME[precision], "nothing was compiled, or it differs"
    torch.testing.assert_close(out.loss, want.loss, rtol=SAME[precision], atol=0)


@gpu
@pytest.mark.parametrize("precision", SAME)
@pytest.mark.parametrize("name", ["object-single", "random-single"])
def test_graphed_is_what_it_captured_on_cuda(name, precision):
    """A replay against the very kernels, with the same random numbers: at most the kernels' own differences."""
    step = Step("cuda", name)
    step.method.precision = precision
    assert speed.compile_pointwise(step.method, step.device) is None
    step.gradients(step.fast)
    graphed = speed.GraphedBackward(step.method, step.generator)

    def replay():
        return graphed(step.images, step.labels, generator=step.generator)

    for _ in range(speed.Graphed.WARM_UP + 1):
        step.gradients(replay)
    state = step.generator.get_state()
    out, found = step.gradients(replay)
    assert graphed.graphed.graph is not None
    kernels = []
    for _ in range(2):
        step.generator.set_state(state)
        given = {"draw": None, "generator": step.generator, "mask": out.mask}
        kernels.append(step.gradients(lambda given=given: step.fast(**given))[1])
    assert error(found, kernels[0]) <= max(1e-6, 3 * error(kernels[1], kernels[0]))
