"""Masks that are kept over epochs."""

import copy
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import after_dying, metrics, rewrite, tensors

from maskcf_fast.core.processes import Processes
from maskcf_fast.data import Batch
from maskcf_fast.methods import CounterfactualDistiller, label_map
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.training import Trainer, trainer
from maskcf_fast.training.mask_memory import NO_GRAPH, MaskMemory

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def every(change):
    """``every(n, **fields)``: a run of 3 steps per epoch of 16 images, which leave out 12 of the 60."""

    def changed(n, epochs=4, **fields):
        fields = {"eval_every": 0, "log_every": 1, **fields}
        return change(method={"cam_every": n}, optim={"batch_size": 16, "epochs": epochs}, **fields)

    return changed


def losses(folder):
    return [[line[name] for name in ("step", "loss", "task", "distill")] for line in metrics(folder, "loss")]


def spied(run, monkeypatch):
    """A trainer, and by step: the images, the mask, and the size of every batch that a map was made for."""
    steps = []
    real = {"map": label_map.relevance_cam, "step": run._optimizer_step, "backward": run.method.backward}

    def count(taps, grads, **options):
        steps[-1]["maps"].append(len(grads[0]))
        return real["map"](taps, grads, **options)

    def step(micro):
        steps.append({"indices": micro[0].indices.tolist(), "maps": []})
        with monkeypatch.context() as patch:
            patch.setattr(label_map, "relevance_cam", count)
            real["step"](micro)

    def backward(*args, **options):
        out = real["backward"](*args, **options)
        steps[-1]["mask"] = out.mask
        steps[-1]["cam"] = out.cam
        return out

    monkeypatch.setattr(run, "_optimizer_step", step)
    monkeypatch.setattr(run.method, "backward", backward)
    return steps


@pytest.mark.parametrize("n", [2, 3])
def test_a_model_that_stands_still_has_the_same_run(every, tmp_path, n):
    """Its masks do not change, so that an old one is the one it would make."""
    results = []
    for k in (1, n):
        run = Trainer(every(k, out=tmp_path / str(k)), quiet=True)
        assert (run.memory is None) == (k == 1)
        weights = [p.detach() for p in run.method.student.parameters()]
        start = [p.clone() for p in weights]
        run.optimizer.register_step_post_hook(lambda *_, a=weights, b=start: torch._foreach_copy_(a, b))
        run.run()
        results.append(losses(run.folder))
    assert len(results[0]) == 12
    assert results[0] == results[1]
    assert all(map(torch.equal, weights, start))


def test_maps_are_made_in_every_nth_epoch_only_and_masks_are_of_the_last(every, monkeypatch):
    run = Trainer(every(2), quiet=True)
    steps = spied(run, monkeypatch)
    run.run()
    order = [np.random.default_rng([run.config.seed, epoch]).permutation(60)[:48].tolist() for epoch in range(4)]
    assert [i for s in steps for i in s["indices"]] == [i for epoch in order for i in epoch]
    for epoch in range(4):
        for s in steps[3 * epoch : 3 * epoch + 3]:
            if epoch % 2 == 0:
                assert s["maps"] == [16]
                assert s["cam"] is not None
            else:  # those that the epoch before left out
                new = len(set(s["indices"]) - set(order[epoch - 1]))
                assert s["maps"] == ([new] if new else [])
                assert s["cam"] is None
    assert sum(len(set(order[e]) - set(order[e - 1])) for e in (1, 3)) > 0, "nothing was left out"
    masks = [{}, {}, {}, {}]
    for i, s in enumerate(steps):
        masks[i // 3] |= dict(zip(s["indices"], s["mask"], strict=True))
    for epoch, same in ((1, True), (2, False), (3, True)):
        both = masks[epoch].keys() & masks[epoch - 1].keys()
        assert len(both) > 20
        assert all(torch.equal(masks[epoch][i], masks[epoch - 1][i]) for i in both) == same


@pytest.mark.parametrize(("backend", "died_at"), [("torch", 2), ("torch", 3), ("torch", 5), ("dali", 4)])
def test_resume_is_exact(every, tmp_path, monkeypatch, backend, died_at):
    """Within an epoch of maps and one of memory, and between them."""
    config = every(2, data={"backend": backend}, checkpoint_every=1)
    whole = Trainer(replace(config, out=tmp_path / "whole"), quiet=True)
    expected = whole.run()
    resumed = after_dying(config, tmp_path / "broken", died_at)
    assert resumed.step == died_at
    steps = spied(resumed, monkeypatch)
    assert resumed.run() == expected
    for a, b in zip(whole.method.student.parameters(), resumed.method.student.parameters(), strict=True):
        assert torch.equal(a, b)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert torch.equal(whole.memory.masks, resumed.memory.masks)
    if died_at >= 3:  # the rest of the second epoch still knows the masks of the first
        assert all(s["maps"] != [16] for s in steps[: 6 - died_at])


def test_state_is_packed_and_comes_back():
    method = SimpleNamespace(student=SimpleNamespace(backbone=SimpleNamespace(config=SimpleNamespace(num_patches=13))))
    memory = MaskMemory(method, 23, 2, ALONE)
    memory.masks.copy_(torch.rand(23, 13) < 0.4)
    memory.known.copy_(torch.rand(23) < 0.5)
    state = memory.state_dict()
    assert [t.nbytes for t in state.values()] == [3, 23 * 2]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = MaskMemory(method, 23, 2, ALONE)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.masks, memory.masks)
    assert torch.equal(other.known, memory.known)

    other.start_epoch(3)
    assert torch.equal(other.known, memory.known)
    other.start_epoch(4)
    assert not other.known.any()
    assert not other.masks.any()

    with pytest.raises(RuntimeError, match=r"masks are torch.uint8 \[23, 2\], not uint8 \[24, 2\]"):
        MaskMemory(method, 24, 2, ALONE).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"masks are torch\.bool"):
        other.load_state_dict({"known": state["known"].bool(), "masks": state["masks"]})


@pytest.mark.parametrize("spoil", [lambda s: {}, lambda s: {**s, "masks.masks": s["masks.masks"][:-1]}])
def test_damaged_state_is_refused(every, spoil):
    config = every(2, epochs=1)
    Trainer(config, quiet=True).run()
    held = {name: x for name, x in tensors(config.out).items() if not name.startswith("masks.")}
    rewrite(config.out, change_tensors=lambda t: held | spoil({name: t[name] for name in t.keys() - held.keys()}))
    with pytest.raises(ValueError, match=r"step-\d+ (is damaged|lacks masks)"):
        Trainer(replace(config, out=None, resume=config.out), quiet=True)
    with pytest.raises(ValueError, match=r"changed: --method.cam-every \(was 2, is 1\)"):
        Trainer(replace(every(1, epochs=1), out=None, resume=config.out), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"cam_every": 0}}, "method.cam_every must be positive and finite, got 0"),
        ({"data": {"augment": "crop-flip"}}, "cam_every=2 reuses an image's mask, but data.augment=crop-flip makes"),
        ({"method": {"strategy": "random-single"}}, "for object and context masks, random-single has no map: use 1"),
        ({"method": {"name": "fd"}}, "is for methods with masks, fd has none: use 1"),
        ({"parallel": "fsdp"}, "does not go with --parallel fsdp: use --parallel ddp"),
    ],
)
def test_settings_that_do_not_go_together(change, changes, message):
    config = change(**{**changes, "method": {"cam_every": 2, **changes.get("method", {})}})
    with pytest.raises(ValueError, match=message):
        config.validate()
    if changes.get("method") != {"cam_every": 0}:
        replace(config, method=replace(config.method, cam_every=1)).validate()


def test_graphs_are_left_out(every, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "why_no_graph", lambda *_: None)  # as on a GPU
    assert not Trainer(every(2, cuda_graph=True), quiet=True).graphed
    assert NO_GRAPH in capsys.readouterr().out


def test_a_step_reads_nothing_back_from_the_device():
    """On the "meta" device, whose tensors hold no values, whatever would wait for a GPU raises."""
    student = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 5))
    method = CounterfactualDistiller(student, copy.deepcopy(student.backbone), "object-single").to("meta")
    memory = MaskMemory(method, 20, 2, Processes(0, 1, torch.device("meta")))
    images, labels = torch.rand(6, 3, 32, 32, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    memory.start_epoch(0)
    for first in (0, 2, 0):  # all new, a few, none
        memory.backward(Batch(images, labels, torch.arange(first, first + 6)))
    assert memory.known.nonzero()[:, 0].tolist() == list(range(8))
