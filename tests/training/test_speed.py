"""Options for speed and memory change no result."""

import ast
import copy
import inspect
import textwrap
from collections import Counter
from dataclasses import replace
from functools import partial
from shutil import copytree

import pytest
import torch

from maskcf_fast.distill import CounterfactualDistiller
from maskcf_fast.distill.methods import run
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.training import Trainer, speed, trainer
from maskcf_fast.training.speed import GraphedBackward, compile_pointwise, why_no_graph

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


@pytest.fixture
def method():
    torch.manual_seed(0)
    student = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 5))
    method = CounterfactualDistiller(student, copy.deepcopy(student.backbone), "object-single")
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return method


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
        states.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["student"])
    assert "--cuda-graph is left out: it is for a GPU" in capsys.readouterr().out
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert any(not torch.equal(states[0][name], p) for name, p in Trainer(
        change(out=tmp_path / "start"), quiet=True).method.student.state_dict().items())  # fmt: skip


READING = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "float", "int", "bool", "print"}


def test_the_loop_reads_nothing_back_from_the_device():
    """Of the trainer's own lines in a step; the method's are run on the "meta" device in tests/distill."""
    for function in (Trainer._optimizer_step, Trainer._update, Trainer._watch):
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


def test_a_graph_is_for_one_scale(method, monkeypatch):
    """Without a GPU, a graph that only counts its replays."""
    replays = []
    monkeypatch.setattr(speed, "Graphed", lambda function, generator: lambda: replays.append(1) or "captured")
    graphed = GraphedBackward(method, torch.Generator())
    images, labels = torch.rand(6, 3, 32, 32), torch.randint(5, (6,))
    options = {"generator": torch.Generator().manual_seed(0), "last": run}
    assert graphed(images, labels, scale=0.5, **options) == "captured"
    assert graphed(images + 1, labels, scale=0.5, **options) == "captured"
    assert torch.equal(graphed.images, images + 1)
    assert graphed(images, labels, scale=1.0, **options) != "captured"
    assert graphed(images[:4], labels[:4], scale=0.5, **options) != "captured"
    assert len(replays) == 2


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
        assert float(rest.optimizer.param_groups[0]["lr"]) == float(rate)
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
