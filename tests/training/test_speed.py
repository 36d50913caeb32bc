"""Options for speed and memory change no result."""

import ast
import inspect
import textwrap
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from shutil import copytree

import pytest
import torch
from runs import tensors
from students import moved

from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.training import Trainer, speed, trainer
from maskcf_fast.training.finite import FiniteWatch
from maskcf_fast.training.speed import GraphedBackward, compile_pointwise, why_no_graph

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


@pytest.fixture
def method():
    student, teacher = moved()
    return CounterfactualDistiller(student, teacher.backbone, "object-single")


def step(method):
    """Outcome, gradients, and the shapes of all matrix products of one step."""
    torch.manual_seed(1)
    images, labels = torch.rand(6, 3, 32, 32), torch.randint(5, (6,))
    draw = method.strategy.draw(6, 16, generator=torch.Generator().manual_seed(0))
    method.zero_grad()
    with torch.profiler.profile(record_shapes=True) as profile:
        out = method.backward(images, labels, draw=draw)
    products = Counter((e.name, str(e.input_shapes)) for e in profile.events() if e.name in PRODUCTS)
    return out, {name: p.grad.clone() for name, p in method.student.named_parameters()}, products


def test_compiled_equals_eager_and_forms_no_weight_gradient_for_the_map(method):
    out, grads, products = step(method)
    assert compile_pointwise(method, torch.device("cpu")) is None
    assert hasattr(method.student.backbone.blocks[0].pointwise[0], "_torchdynamo_orig_callable")
    step(method)  # compiles
    compiled, compiled_grads, compiled_products = step(method)
    assert compiled_products == products
    assert products.total() > 100
    torch.testing.assert_close(compiled.loss, out.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(compiled.cam, out.cam, rtol=1e-4, atol=1e-7)
    assert torch.equal(compiled.mask, out.mask)
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() < 1e-5 * grad.norm(), name
    assert any(not torch.equal(compiled_grads[name], grad) for name, grad in grads.items()), "nothing was compiled"


def test_without_a_compiler(method, monkeypatch):
    def broken(function, **_):
        def raises(*args):
            raise RuntimeError("no C++ compiler\nand a long story")

        return raises

    monkeypatch.setattr(torch, "compile", broken)
    message = compile_pointwise(method, torch.device("cpu"))
    assert message == "--compile is left out, the compiler failed: no C++ compiler"
    step(method)


def test_why_no_graph(method):
    assert "it is for a GPU, and the device is cpu" in why_no_graph(torch.device("cpu"), 1, method)
    assert "one process, and there are 2" in why_no_graph(torch.device("cuda"), 2, method)
    assert why_no_graph(torch.device("cuda"), 1, method) is None
    student, teacher = method.student, method.teacher
    lengths = CounterfactualDistiller(student, teacher, "object-none")
    assert "object-none by threshold" in why_no_graph(torch.device("cuda"), 1, lengths)
    assert why_no_graph(torch.device("cuda"), 1, CounterfactualDistiller(student, teacher, "random-none")) is None


def test_a_run_with_all_options_is_the_same_run(change, tmp_path, capsys):
    states = []
    for name, options in {"plain": {}, "fast": {"cuda_graph": True, "recompute": True}}.items():
        Trainer(change(out=tmp_path / name, **options), quiet=True).run()
        states.append(tensors(tmp_path / name, "student."))
    assert "--cuda-graph is left out: it is for a GPU" in capsys.readouterr().out
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert any(not torch.equal(states[0][name], p) for name, p in Trainer(
        change(out=tmp_path / "start"), quiet=True).method.student.state_dict().items())  # fmt: skip


READING = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "float", "int", "bool", "print"}


def test_the_loop_reads_nothing_back_from_the_device():
    """Of the trainer's own lines in a step; the method's are run on the "meta" device in tests/methods."""
    for function in (Trainer._optimizer_step, Trainer._update, FiniteWatch.add):
        names = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
            if isinstance(node, ast.Call)
        }
        assert names, function
        assert not names & READING, function


@pytest.mark.parametrize("strategy", ["object-single", "object-none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_runs_survive_every_shape(change, write_images, tmp_path, strategy, precision, monkeypatch):
    """A remainder of one image, and a number of tokens that changes at every step."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    write_images(tmp_path / "test", 13, seed=5)  # of each class: batches of 12, 12, 12 and 3
    config = change(
        method={"strategy": strategy}, data={"id": tmp_path / "test"}, optim={"batch_size": 4}, precision=precision
    )
    compiled = Trainer(replace(config, compile=True), quiet=True)
    assert hasattr(compiled.method.student.backbone.blocks[0].pointwise[0], "_torchdynamo_orig_callable")
    compiled.run()
    assert compiled.step == compiled.total_steps == 30


class Cuda:
    """What `Graphed` asks of torch.cuda, written down in order; a capture runs nothing but the function."""

    def __init__(self, monkeypatch):
        self.calls = []
        cuda = self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                cuda.calls.append(f"{self.name} waits for {other.name}")

        class Graph:
            def register_generator_state(self, generator):
                assert isinstance(generator, torch.Generator)
                cuda.calls.append("generator")

            def replay(self):
                cuda.calls.append("replay")

        @contextmanager
        def capture(graph, capture_error_mode):
            cuda.calls.append(f"capture, {capture_error_mode}")
            yield

        current = Stream("current")
        for name, fake in {
            "Stream": Stream, "current_stream": lambda: current, "stream": lambda _: nullcontext(),
            "CUDAGraph": Graph, "graph": capture,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_graph_is_captured_after_steps_that_run(monkeypatch):
    cuda = Cuda(monkeypatch)
    graphed = speed.Graphed(lambda: cuda.calls.append("run") or len(cuda.calls), torch.Generator())
    for _ in range(3):
        graphed()
    assert cuda.calls == ["side waits for current", "run", "current waits for side"] * 3
    cuda.calls.clear()
    out = graphed()
    assert cuda.calls == ["generator", "capture, thread_local", "run", "replay"]
    assert graphed() == out
    assert cuda.calls[4:] == ["replay"]


def test_what_cannot_be_captured_is_said(monkeypatch):
    Cuda(monkeypatch)
    calls = []

    def function():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphed = speed.Graphed(function, torch.Generator())
    for _ in range(3):
        graphed()
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing\): run without --cuda-graph"):
        graphed()


def test_a_graph_is_for_one_scale(method, monkeypatch):
    cuda = Cuda(monkeypatch)
    graphed = GraphedBackward(method, torch.Generator())
    images, labels = torch.rand(6, 3, 32, 32), torch.randint(5, (6,))
    options = {"generator": torch.Generator().manual_seed(0)}
    graphed(images, labels, scale=1.0, **options)  # the last step of an epoch, that a run was continued at
    for _ in range(4):
        out = graphed(images, labels, scale=0.5, **options)
    assert cuda.calls[-1] == "replay"
    assert graphed(images + 1, labels, scale=0.5, **options) is out
    assert torch.equal(graphed.images, images + 1)
    assert graphed(images, labels, scale=1.0, **options) is not out
    assert graphed(images[:4], labels[:4], scale=0.5, **options) is not out
    assert cuda.calls.count("replay") == 2


@gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("beta1", [False, True])
def test_a_graphed_run_is_the_plain_run(change, tmp_path, recompute, beta1):
    """Six steps and the remainder of an epoch, with a loader's threads beside; nothing read back in a step."""

    def train(name, **options):
        settings = {"cycle_beta1": beta1, "accumulate": 2, "epochs": 4}
        config = change(out=tmp_path / name, device="cuda", data={"threads": 2}, optim=settings, **options)
        trained = Trainer(config, quiet=True)
        start = torch.cat([p.detach().flatten() for p in trained.method.student.parameters()])
        step = trained._optimizer_step

        def watched(micro):
            warm = trained.step >= 5  # kernels are loaded, the graph is captured
            torch.cuda.set_sync_debug_mode("error" if warm else "default")
            step(micro)
            torch.cuda.set_sync_debug_mode("default")

        trained._optimizer_step = watched
        trained.run()
        weights = torch.cat([p.detach().flatten() for p in trained.method.student.parameters()])
        return weights, weights - start, trained

    plain, moved, _ = train("plain")
    weights, _, graphed = train("graphed", cuda_graph=True, recompute=recompute)
    assert graphed.backward.graphed.graph is not None
    assert beta1 or graphed.update.graph is not None
    assert (weights - plain).norm() < 1e-2 * moved.norm()


def test_what_graphs_capture_stays_where_it_is(change, tmp_path, monkeypatch, capsys):
    """Everything a graph needs but the graph: fixed gradients, a learning rate that the schedule writes in place.

    Interrupted and continued with and without, the run is the plain one.
    """

    class InPlace(speed.Graphed):
        def __call__(self):
            return self.function()

    def weights(run):
        return torch.cat([p.detach().flatten() for p in run.method.student.parameters()])

    settings = {"optim": {"cycle_beta1": False, "accumulate": 2, "epochs": 2}}
    plain = Trainer(change(out=tmp_path / "plain", **settings), quiet=True)
    start = weights(plain)
    plain.run()
    monkeypatch.setattr(speed, "Graphed", InPlace)
    monkeypatch.setattr(trainer, "Graphed", InPlace)
    monkeypatch.setattr(trainer, "why_no_graph", lambda *_: None)
    half = Trainer(change(out=tmp_path / "graphed", cuda_graph=True, **settings))
    assert "AdamW" not in capsys.readouterr().out
    half._train_epoch()
    places = [p.grad.data_ptr() for p in half.method.student.parameters()]
    rate = half.optimizer.param_groups[0]["lr"]
    half._save()
    for graphs in (True, False):
        folder = tmp_path / str(graphs)
        copytree(tmp_path / "graphed", folder)
        rest = Trainer(change(resume=folder, cuda_graph=graphs, **settings), quiet=True)
        assert isinstance(rest.optimizer.param_groups[0]["lr"], torch.Tensor) == graphs
        assert rest.optimizer.param_groups[0]["capturable"] == graphs
        assert float(rest.optimizer.param_groups[0]["lr"]) == pytest.approx(float(rate), rel=1e-6)  # float32 in a graph
        rest.run()
        moved = weights(plain) - start
        assert (weights(rest) - weights(plain)).norm() < 1e-4 * moved.norm()  # the rate is rounded to float32
    half._train_epoch()
    assert half.optimizer.param_groups[0]["lr"] is rate
    assert places == [p.grad.data_ptr() for p in half.method.student.parameters()]


def test_adamw_stays_outside_where_beta1_moves(change, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "why_no_graph", lambda *_: None)
    run = Trainer(change(out=tmp_path / "run", cuda_graph=True), quiet=True)
    assert "--optim.cycle-beta1 False" in capsys.readouterr().out
    assert isinstance(run.backward, GraphedBackward)
    assert not isinstance(run.update, speed.Graphed)
