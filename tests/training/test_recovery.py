"""What a run does when a step, the data or the memory fails, and what it can be continued with afterwards."""

import json
import math
import shutil
import time
from dataclasses import replace

import pytest
import torch
from runs import metrics, values

from maskcf_fast.training import Trainer, TrainingDiverged
from maskcf_fast.training import trainer as trainer_module
from maskcf_fast.training.log import RunLog


def poison(trainer, *steps):
    """Give these steps (from 0) a loss and gradients of NaN; the images that each step takes."""
    real, taken = trainer.backward, []

    def backward(images, labels, **options):
        out = real(images, labels, **options)
        if len(taken) in steps:
            trainer.method.student.head.bias.grad.fill_(math.nan)
            out = out._replace(loss=out.loss * math.nan)
        taken.append(None)
        return out

    trainer.backward = backward
    step = trainer._optimizer_step

    def remember(micro):
        files = [trainer._finite.paths[i] for batch in micro for i in batch.indices.tolist()]
        step(micro)
        taken[-1] = files

    trainer._optimizer_step = remember
    return taken


def bad_steps(folder):
    return [json.loads(line) for line in (folder / "not_finite.jsonl").read_text().splitlines()]


def test_bad_steps_are_skipped_and_written_down(change):
    trainer = Trainer(change(on_nan="skip", log_every=1), quiet=True)
    before = []
    weights = list(trainer.method.student.parameters())
    trainer.optimizer.register_step_pre_hook(lambda *_: before.append([p.detach().clone() for p in weights]))
    taken = poison(trainer, 3, 7)
    trainer.run()
    assert trainer.step == trainer.total_steps == 10
    assert bad_steps(trainer.folder) == [{"step": n, "images": taken[n - 1]} for n in (4, 8)]
    for n in range(9):  # the weights before a step and before the next are the same where it was bad
        same = all(map(torch.equal, before[n], before[n + 1]))
        assert same == (n in (3, 7)), n
    assert values(trainer.folder)["skipped"] == 2
    assert all(math.isfinite(line["loss"]) for line in metrics(trainer.folder, "loss"))


def test_no_more_than_some_are_skipped(change, monkeypatch):
    monkeypatch.setattr(trainer_module, "MOST_SKIPPED", 2)
    trainer = Trainer(change(on_nan="skip", log_every=1), quiet=True)
    poison(trainer, 1, 3, 6)
    with pytest.raises(TrainingDiverged, match="at step 7, and at 2 others of 10"):
        trainer.run()
    assert [line["step"] for line in bad_steps(trainer.folder)] == [2, 4, 7]


def test_a_run_that_diverged_continues_with_a_lower_rate(change):
    """And with no other change; one that did not diverge with none at all."""
    config = change(checkpoint_every=2, log_every=1)
    trainer = Trainer(config, quiet=True)
    poison(trainer, 6)
    with pytest.raises(TrainingDiverged, match=r"at step 7 of 10; .*step-6; .*--optim.lr 0.00033 \(was 0.001\)"):
        trainer.run()

    lower = replace(config, resume=config.out, optim=replace(config.optim, lr=3.3e-4))
    with pytest.raises(ValueError, match=r"changed: --seed \(was 0, is 1\)$"):
        Trainer(replace(lower, seed=1), quiet=True)
    resumed = Trainer(lower, quiet=True)
    assert resumed.step == 6
    fresh = Trainer(replace(lower, out=config.out.parent / "fresh", resume=None), quiet=True)
    for _ in range(6):
        fresh.optimizer.step()
        fresh.schedule.step()
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(fresh.optimizer.param_groups[0]["lr"], rel=1e-12)
    resumed.run()
    assert values(config.out)["step"] == 10

    (config.out / "not_finite.jsonl").unlink()
    with pytest.raises(ValueError, match=r"changed: --optim.lr \(was 0.00033, is 0.001\)"):
        Trainer(replace(config, resume=config.out), quiet=True)


def test_images_may_move_and_may_not_change(change, image_folders, tmp_path):
    config = change(optim={"epochs": 1}, data={"ood": ()})
    expected = Trainer(config, quiet=True).run()
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(image_folders["train"], moved)
    resume = replace(config, resume=config.out, data=replace(config.data, train=moved))
    trainer = Trainer(resume, quiet=True)
    assert trainer.loader.manifest.root == moved
    assert trainer.run() == expected
    shutil.copytree(image_folders["train"], other)
    (other / "cat" / "000.jpg").rename(other / "dog" / "999.jpg")
    with pytest.raises(ValueError, match="was run on other images than those here now: train; put those back"):
        Trainer(replace(resume, data=replace(config.data, train=other)), quiet=True)
    with pytest.raises(FileNotFoundError, match=r"gone.*if the images have moved: --resume .* --data.train NEW"):
        Trainer(replace(resume, data=replace(config.data, train=tmp_path / "gone")), quiet=True)


def test_tensorboard_shows_a_step_once(tmp_path):
    """What a run that begins again, or goes on, writes anew takes the place of what was there; step 0, too."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (0, 2.0), (2, 3.0)):
        log = RunLog(tmp_path, start)
        for step in range(start, 4):
            log.write(step, **{"accuracy/id": value})
        log.close()
        time.sleep(1.1)  # the files are read in the order of their names, which hold the second
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("accuracy/id")
    assert [(event.step, event.value) for event in shown] == [(0, 2.0), (1, 2.0), (2, 3.0), (3, 3.0)]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "--recompute True .* and --optim.accumulate 2 .half as many"),
        ({"recompute": True}, "--optim.accumulate 2 .* and --precision bf16$"),
        ({"recompute": True, "precision": "bf16", "optim": {"batch_size": 2}}, "a smaller model$"),
    ],
)
def test_out_of_memory_names_the_batch_and_what_helps(change, changes, advice):
    trainer = Trainer(change(**changes), quiet=True)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.backward = full
    size = trainer.config.optim.batch_size
    with pytest.raises(
        ValueError, match=rf"cpu is out of memory with batches of {size} images of 32×32.* try {advice}"
    ):
        trainer.run()
