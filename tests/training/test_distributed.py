"""Two processes on one machine, over gloo."""

import os
import signal
import socket
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import tensors, values
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskcf_fast import core
from maskcf_fast.core.errors import UserError
from maskcf_fast.core.processes import Processes
from maskcf_fast.data import LoaderConfig, Manifest, build_loader, scan_images
from maskcf_fast.evaluation import measure
from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer, preset
from maskcf_fast.training import Trainer
from maskcf_fast.training.build import as_benchmark
from maskcf_fast.training.cost import step_cost
from maskcf_fast.training.sharding import shard


def join(rank, port):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    return Processes.start("cpu")


def failing(rank, port, path, fails):
    """The second of two fails while the first, which came late, waits for it; what each then says."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    core.processes.GRACE = 1.0
    time.sleep(1.0 if rank == 0 else 0.0)
    processes = join(rank, port)
    try:
        with processes.reporting():
            if rank == 1:
                fails()
            processes.barrier()
    except Exception as error:
        (path / str(rank)).write_text(" ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))


def by_itself():
    raise UserError("no such file")


def by_a_bug():
    raise KeyError("a bug")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def first_gradient(rank, port, config, path):
    processes = join(rank, port)
    trainer = Trainer(config, processes, quiet=True)
    batches = []
    trainer.optimizer.step = lambda: None
    step = trainer._optimizer_step

    def record(micro):
        batches.append([(b.images, b.labels, trainer.generator.get_state()) for b in micro])
        if len(batches) == 1:
            zero = trainer.optimizer.zero_grad
            trainer.optimizer.zero_grad = lambda **_: None
            step(micro)
            grads = {n: p.grad.clone() for n, p in trainer.method.student.named_parameters()}
            torch.save({"grads": grads, "batches": batches[0]}, f"{path}/{rank}.pt")
            trainer.optimizer.zero_grad = zero
            zero()
        else:
            step(micro)

    trainer._optimizer_step = record
    trainer.run()
    processes.stop()


def whole_run(rank, port, config, died_at):
    processes = join(rank, port)
    if config.compile:
        torch.compile = partial(torch.compile, backend="eager")
    trainer = Trainer(config, processes, quiet=True)
    compiled = hasattr(trainer.method.student.backbone.blocks[0].pointwise[0], "_torchdynamo_orig_callable")
    assert compiled == config.compile
    if died_at is not None:
        real = trainer._optimizer_step
        trainer._optimizer_step = lambda micro: trainer.step == died_at or real(micro)
        trainer._save = (lambda save: lambda: trainer.step >= died_at or save())(trainer._save)
        trainer.total_steps = died_at
    trainer.run()
    processes.stop()
    if config.parallel == "ddp":
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        assert "pt_gloo_runloop" not in threads, "they could abort the process at Python's end"


def run(port, config, died_at=None):
    mp.spawn(whole_run, (port, config, died_at), nprocs=2)


def build(rank, port, config, path):
    """How much this process holds of the models, once they are built, and at most before."""
    processes = join(rank, port)
    with Held() as memory:
        trainer = Trainer(config, processes, quiet=True)
        held = sum(p.to_local().nbytes for p in trainer.method.parameters())
    torch.save({"held": held, "peak": memory.peak}, f"{path}/{rank}.pt")
    processes.stop()


def divided_step(rank, port, config, precision, path):
    """Bytes of a divided step's state, and what the step holds beside it at its highest point, by live storages."""
    processes = join(rank, port)
    student = ImageClassifier(VisionTransformer(config), CosineClassifier(config.feature_dim, 10))
    method = CounterfactualDistiller(student, VisionTransformer(config), "object-single").train()
    method.precision, method.keep_casts = precision, False  # as the trainer has it
    shard(method, processes)
    optimizer = torch.optim.AdamW(student.parameters())
    images, labels = torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    for _ in range(2):
        method.backward(images, labels)
        optimizer.step()
    held = [*method.parameters(), *(p.grad for p in student.parameters())]
    held += [moment for one in optimizer.state.values() for name, moment in one.items() if name != "step"]
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
    with Held({part.untyped_storage()._cdata for part in parts}) as beside:
        method.backward(images, labels)
    torch.save({"state": sum(part.nbytes for part in parts), "beside": beside.peak}, f"{path}/{rank}.pt")
    processes.stop()


class Held(TorchDispatchMode):
    """The most bytes at a time in the storages that are seen, but for some and those on the meta device.

    Of each as large as it is by then: FSDP resizes those that it gathers blocks in.
    """

    def __init__(self, without=()):
        super().__init__()
        self.without, self.live, self.peak = without, weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.without:
                    self.live.add(storage)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live))
        return out


def known_masks(rank, port, config, path):
    """Two epochs of a model that stands still; what each process then knows."""
    processes = join(rank, port)
    trainer = Trainer(config, processes, quiet=True)
    weights = [p.detach() for p in trainer.method.student.parameters()]
    start = [p.clone() for p in weights]
    trainer.optimizer.register_step_post_hook(lambda *_: torch._foreach_copy_(weights, start))
    first = []
    real = trainer._train_epoch

    def epoch():
        real()
        first.append(trainer.memory.known.clone())

    trainer._train_epoch = epoch
    trainer.run()
    torch.save({"first": first[0], "known": trainer.memory.known, "masks": trainer.memory.masks}, f"{path}/{rank}.pt")
    processes.stop()


def test_a_failure_is_reported_once_also_after_a_restart(port, tmp_path):
    """All on one store, as under torchrun --max-restarts: each start finds what those before it left there."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    who = f"process 1 of 2 (host {socket.gethostname()})"
    for fails, expected in [
        (by_itself, {"1": f"UserError: {who}: no such file"}),
        (killed, {"0": f"UserError: {who} ended without a word, killed or out of memory"}),
        (by_a_bug, {"1": f"KeyError: 'a bug' in {who}"}),
    ]:
        folder = tmp_path / str(store.add("starts", 1))
        folder.mkdir()
        spawn = mp.get_context("spawn").Process
        started = [spawn(target=failing, args=(rank, port, folder, fails), daemon=True) for rank in range(2)]
        for process in started:
            process.start()
        for process in started:
            process.join(60)
        said = {path.name: path.read_text() for path in folder.iterdir()}
        reported = {rank: text for rank, text in said.items() if not text.startswith("ReportedError")}
        assert reported.keys() == expected.keys(), said
        assert all(reported[rank].startswith(text) for rank, text in expected.items()), said


def test_averaged_gradient_is_that_of_one_process_on_the_same_micro_batches(change, port, tmp_path):
    config = change(
        method={"strategy": "object-single"}, optim={"epochs": 1, "accumulate": 2, "batch_size": 24, "clip": 1e9}
    )
    mp.spawn(first_gradient, (port, config, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name, grad in ranks[0]["grads"].items():
        assert torch.equal(grad, ranks[1]["grads"][name])

    assert not torch.equal(ranks[0]["batches"][0][2], ranks[1]["batches"][0][2]), "the processes draw the same donors"

    alone = Trainer(replace(config, out=tmp_path / "alone"), quiet=True)
    micro_batches = [(*batch[:2], rank["batches"], i) for rank in ranks for i, batch in enumerate(rank["batches"])]
    assert len(micro_batches) == 4
    for rank in ranks:
        # Each process draws the donors of its micro-batches one after the other.
        alone.generator.set_state(rank["batches"][0][2])
        for images, labels, _ in rank["batches"]:
            (alone.method(images, labels, generator=alone.generator).loss / 4).backward()
    for name, p in alone.method.student.named_parameters():
        got = ranks[0]["grads"][name]
        assert (got - p.grad).norm() <= 1e-5 * p.grad.norm(), name
    seen = [tuple(image.flatten()[:64].tolist()) for images, *_ in micro_batches for image in images]
    assert len(set(seen)) == 24, "the processes trained on the same images"


def test_evaluation_counts_every_image_once_and_resume_is_exact(change, port, tmp_path):
    config = replace(change(optim={"epochs": 2}), checkpoint_every=2)
    run(port, replace(config, out=tmp_path / "whole"))
    state = values(tmp_path / "whole")
    manifest = scan_images(config.data.id)
    model = Trainer(replace(config, out=tmp_path / "alone"), quiet=True).method.student
    expected = tensors(tmp_path / "whole", "student.")
    model.load_state_dict(expected)
    correct = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels, _ in build_loader(manifest, LoaderConfig(4, 32, train=False), "torch")
    )
    assert state["accuracy"]["id"] == 100 * correct / len(manifest)

    broken = replace(config, out=tmp_path / "broken")
    run(port, broken, died_at=3)
    assert values(tmp_path / "broken")["step"] == 2
    run(port, replace(broken, out=None, resume=tmp_path / "broken"))
    assert values(tmp_path / "broken")["step"] == state["step"]
    resumed = tensors(tmp_path / "broken", "student.")
    assert all(torch.equal(resumed[k], v) for k, v in expected.items())


def test_masks_are_shared(change, port, tmp_path):
    """Each process makes those of half the images; after an epoch both know all, and they are one process's."""
    config = change(method={"cam_every": 2}, optim={"epochs": 2, "batch_size": 16})
    mp.spawn(known_masks, (port, config, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    orders = [np.random.default_rng([config.seed, epoch]).permutation(60)[:48] for epoch in range(2)]
    for rank, state in enumerate(ranks):  # 8 images in each of 3 steps, and not yet the other's
        assert sorted(state["first"].nonzero()[:, 0].tolist()) == sorted(orders[0][rank::2])
        assert set(state["known"].nonzero()[:, 0].tolist()) == {*orders[0], *orders[1]}
        assert torch.equal(state["masks"], ranks[0]["masks"])

    alone = Trainer(replace(config, out=tmp_path / "alone"), quiet=True)
    settings = LoaderConfig(20, 32, train=False)
    batches = list(build_loader(scan_images(config.data.train), settings, "torch"))
    masks = torch.cat([alone.method.select(batch.images, batch.labels) for batch in batches])
    assert masks.any(1).all()
    masks[~ranks[0]["known"]] = False
    assert torch.equal(ranks[0]["masks"], masks)


def test_masks_survive_an_interruption_of_both_processes(change, port, tmp_path):
    config = change(method={"cam_every": 2}, optim={"epochs": 2, "batch_size": 16})
    config = replace(config, checkpoint_every=2, eval_every=0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(port, replace(config, out=whole))
    run(port, replace(config, out=broken), died_at=3)
    assert values(broken)["step"] == 2  # within the epoch of maps
    run(port, replace(config, out=None, resume=broken))
    assert values(broken)["step"] == values(whole)["step"] == 6
    expected, got = tensors(whole), tensors(broken)
    assert {"masks.known", "masks.masks"} < got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


def test_divided_parameters_give_the_same_run(change, port, tmp_path):
    """FSDP, compiled, against DDP: the same sums in another order, also of averages. Resumed half-way, to the bit."""
    optim = {"epochs": 1, "accumulate": 2, "batch_size": 12, "clip": 1e9, "ema_student": 0.9, "layer_decay": 0.8}
    config = replace(change(method={"ema_teacher": "beta"}, optim=optim), checkpoint_every=2)
    states = {}
    for parallel in ("ddp", "fsdp"):
        out = tmp_path / parallel
        run(port, replace(config, out=out, parallel=parallel, compile=parallel == "fsdp"))
        states[parallel] = tensors(out)
    start = Trainer(replace(config, out=tmp_path / "start"), quiet=True).method.student.state_dict()
    assert states["fsdp"].keys() == states["ddp"].keys()
    for name, value in states["ddp"].items():
        kind, _, parameter = name.partition(".")
        parameter = f"backbone.{parameter}" if kind == "teacher" else parameter
        moved = (value if kind == "optimizer" else value - start[parameter]).norm()
        assert moved > 0, name
        other = states["fsdp"][name]
        if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which Adam blows up
            value, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (value, other))
        assert (other - value).norm() < 1e-3 * moved, name
    assert values(tmp_path / "fsdp")["accuracy"] == values(tmp_path / "ddp")["accuracy"]

    broken = replace(config, out=tmp_path / "broken", parallel="fsdp", compile=True)
    run(port, broken, died_at=3)
    run(port, replace(broken, out=None, resume=tmp_path / "broken"))
    resumed = tensors(tmp_path / "broken")
    assert all(torch.equal(resumed[name], value) for name, value in states["fsdp"].items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_another_number_of_processes(parallel, change, port, tmp_path):
    """Where nothing is drawn, as in feature distillation, one process continues what two began to the same end."""
    config = change(method={"name": "fd"}, optim={"epochs": 1, "batch_size": 12, "clip": 1e9})
    config = replace(config, checkpoint_every=2, parallel=parallel)
    run(port, replace(config, out=tmp_path / "whole"))
    run(port, replace(config, out=tmp_path / "run"), died_at=3)
    alone = replace(config, out=None, resume=tmp_path / "run")
    with pytest.raises(ValueError, match=r"written by 2 process\(es\), now there are 1: .*--elastic True"):
        Trainer(alone, quiet=True)
    trainer = Trainer(replace(alone, elastic=True), quiet=True)
    saved = tensors(tmp_path / "run")
    loaded = trainer._tensors()
    assert [name for name in {**saved, **loaded} if not torch.equal(saved[name], loaded[name])] == []
    trainer.run()
    assert values(tmp_path / "run")["step"] == values(tmp_path / "whole")["step"] == 5
    expected, got = tensors(tmp_path / "whole", "student."), tensors(tmp_path / "run", "student.")
    start = Trainer(replace(config, out=tmp_path / "start"), quiet=True).method.student.state_dict()
    for name, value in expected.items():
        tolerance = 0.1 if name.endswith("qkv.bias") else 1e-3  # as above
        assert (got[name] - value).norm() < tolerance * (value - start[name]).norm(), name


def test_no_process_holds_a_whole_divided_model(change, port, tmp_path):
    """Half of student and teacher in each; while they are built, no more than that and one tensor at a time.

    But for the main process, which reads the file on the CPU, where other models' weights are renamed.
    """
    mp.spawn(build, (port, change(parallel="fsdp"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    method = Trainer(change(out=tmp_path / "alone"), quiet=True).method
    whole = sum(p.nbytes for p in method.parameters())
    largest = max(p.nbytes for p in method.parameters())
    assert sum(rank["held"] for rank in ranks) == whole
    assert ranks[0]["held"] - ranks[1]["held"] < 0.02 * whole
    assert ranks[1]["held"] <= ranks[1]["peak"] <= ranks[1]["held"] + 4 * largest < 0.75 * whole


def test_a_process_without_test_images_takes_part_in_every_exchange():
    """Else the others would wait for it."""
    calls = []

    def add(counts):
        calls.append("sum")
        if counts.shape == (2, 2):  # by class: the other process has seen two images, one of them rightly
            counts += torch.tensor([[2, 0], [1, 0]])

    others = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: calls.append("gather") or [value, 1], sum=add
    )
    manifest = Manifest(Path("x"), ("a", "b"), ("a/0.png",), (0,), ())
    result = measure(torch.nn.Identity(), as_benchmark("id", manifest), [], others)
    assert result.top1 == 50.0
    assert calls == ["gather", *["sum"] * 4]


def test_batch_must_divide(change):
    config = change(optim={"batch_size": 10, "accumulate": 3})
    with pytest.raises(ValueError, match=r"batch_size=10 does not divide into 1 process\(es\) × accumulate=3"):
        Trainer(config, quiet=True)
    assert not dist.is_initialized()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_each_of_two_is_said_to_hold(precision, port, tmp_path):
    """Half of the state; activations as alone; and some whole blocks, of which six are said: others gather ahead."""
    config = preset("tiny", width=192, depth=12)
    mp.spawn(divided_step, (port, config, precision, str(tmp_path)), nprocs=2)
    cost = step_cost(config, 8, classes=10, precision=precision)
    alone = cost.memory["activations"] + cost.memory["buffers of the ops"]
    state = 2 * (cost.divided(2) - 6 * cost.block - alone)
    for rank in range(2):
        held = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert held["state"] == pytest.approx(state / 2, rel=0.01)  # and the teacher's embedding, which stays whole
        blocks = (held["beside"] - alone) / cost.block
        assert 2 < blocks < (4 if precision == "fp32" else 5)  # a CPU computes attention in float32
        assert held["state"] + held["beside"] < cost.divided(2) < 1.1 * (held["state"] + held["beside"])
