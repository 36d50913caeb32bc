import errno
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import after_dying, metrics, rewrite, tensors, values
from safetensors.torch import load_file, save_file

from maskcf_fast.core.errors import UserError
from maskcf_fast.core.processes import Processes
from maskcf_fast.core.tensors import load_json, save_json, save_tensors
from maskcf_fast.data import Manifest, scan_images
from maskcf_fast.methods import MaskStrategy, strategy_names
from maskcf_fast.models import VisionTransformer
from maskcf_fast.training import Trainer, TrainingDiverged
from maskcf_fast.training import trainer as trainer_module
from maskcf_fast.training.build import build_method, scan
from maskcf_fast.training.checkpoint import ALONE, read_checkpoint, save_checkpoint
from maskcf_fast.training.folder import AUTO, clean, prepare
from maskcf_fast.training.runs import read_run
from maskcf_fast.training.settings import DataConfig, MethodConfig

METHODS = [{"name": n} for n in ("ft", "lp", "fd", "kd")] + [{"strategy": name} for name in strategy_names()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.get("name") or m["strategy"])
def test_every_method_runs(change, method):
    config = change(method=method | {"weight": 1.0}, optim={"epochs": 1})
    trainer = Trainer(config, quiet=True)
    before = {n: p.clone() for n, p in trainer.method.student.named_parameters()}
    accuracy = trainer.run()
    assert set(accuracy) == {"id", "ood"}
    moved = {n for n, p in trainer.method.student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == ({"head.weight", "head.bias"} if method.get("name") == "lp" else set(before))
    saved = load_file(config.out / "model.safetensors")
    assert all(torch.equal(saved[n], p) for n, p in trainer.method.student.state_dict().items())


def test_it_learns(change):
    accuracy = Trainer(change(method={"name": "ft"}, optim={"epochs": 6}), quiet=True).run()
    assert accuracy["id"] >= 90


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"strategy": "object-single"}},
        {"method": {"strategy": "random-multi"}, "data": {"augment": "crop-flip"}},
        {"method": {"strategy": "context-none"}, "optim": {"accumulate": 2}},
    ],
    ids=["object-single", "random-multi, augmented", "context-none, accumulated"],
)
@pytest.mark.parametrize("died_at", [3, 5, 9])
def test_resume_is_exact(change, tmp_path, backend, changes, died_at):
    """Weights, optimiser, metrics and results equal the uninterrupted run's bit for bit."""
    changes = {**changes, "data": {"backend": backend, **changes.get("data", {})}}
    config = replace(change(**changes), checkpoint_every=2, log_every=2)
    whole = Trainer(replace(config, out=tmp_path / "whole"), quiet=True)
    expected = whole.run()
    assert whole.total_steps == 10

    resumed = after_dying(config, tmp_path / "broken", died_at)
    assert resumed.step == (died_at if died_at == 5 else died_at // 2 * 2)
    assert resumed.run() == expected

    for a, b in zip(whole.method.student.parameters(), resumed.method.student.parameters(), strict=True):
        assert torch.equal(a, b)
    states = (whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"])
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in ("exp_avg", "exp_avg_sq"))
    lines = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in metrics(tmp_path / run, "step")]
        for run in ("whole", "broken")
    ]
    assert lines[0] == lines[1]


def test_accumulation_is_the_mean_over_micro_batches(change, tmp_path):
    """Fine-tuning does not mix images, so 2 micro-batches of 30 are one batch of 60."""
    gradients = []
    for accumulate in (1, 2):
        optim = {"accumulate": accumulate, "epochs": 1, "batch_size": 60, "clip": 1e6}
        trainer = Trainer(change(method={"name": "ft"}, optim=optim, out=tmp_path / str(accumulate)), quiet=True)
        trainer.run()
        assert trainer.total_steps == 1
        gradients.append([state["exp_avg"] for state in trainer.optimizer.state_dict()["state"].values()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


def test_bf16_stays_close_to_fp32(change, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        Trainer(change(precision=precision, log_every=1, out=tmp_path / precision), quiet=True).run()
        losses.append([line["loss"] for line in metrics(tmp_path / precision, "loss")])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(("precision", "there", "told"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)])
def test_bf16_on_a_cpu_without_it_is_told(change, monkeypatch, capsys, precision, there, told):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there, raising=False)
    Trainer(change(precision=precision), quiet=True)
    assert capsys.readouterr().out.count("this CPU has no instructions for bf16") == told


def test_tf32_lasts_as_long_as_the_run(change, monkeypatch):
    with pytest.raises(UserError, match="--precision tf32 is of NVIDIA GPUs: fp32 is what this device computes in"):
        Trainer(change(precision="tf32"), quiet=True)
    for module in ("training.trainer", "evaluation.measure"):
        monkeypatch.setattr(sys.modules[f"maskcf_fast.{module}"], "check_precision", lambda *_: None)
    trainer = Trainer(change(precision="tf32", method={"name": "ft"}), quiet=True)
    seen = []
    student = trainer.method.student
    student.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    student.head.weight.register_hook(lambda grad: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    trainer.run()
    assert len(seen) > 20  # forwards and backwards of ten steps, and evaluation
    assert {before, *seen} == {"highest", "high"}
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == before


def test_schedule_is_the_papers(change):
    trainer = Trainer(change(optim={"epochs": 20, "lr": 3e-5}), quiet=True)
    seen = []
    real = trainer._optimizer_step

    def spy(micro):
        group = trainer.optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"][0]))
        real(micro)

    trainer._optimizer_step = spy
    trainer.run()
    rates, betas = zip(*seen, strict=True)
    assert len(rates) == 100
    assert rates[0] == pytest.approx(3e-5 / 25)
    assert max(rates) == pytest.approx(3e-5)
    assert rates.index(max(rates)) == 1  # 2 % of the steps
    assert rates[-1] == pytest.approx(3e-5 / 25 / 1e4)
    assert (betas[0], min(betas), betas[-1]) == pytest.approx((0.95, 0.85, 0.95))
    half = 1 + (99 - 1) // 2  # a cosine is at its mean half way down
    assert rates[half] == pytest.approx((3e-5 + 3e-5 / 25e4) / 2, rel=1e-6)


def test_held_out_images_are_drawn_for_each_seed(change, image_folders, tmp_path):
    folders = (tmp_path / str(i) for i in range(9))

    def held_out(**options):
        loader = Trainer(change(**options, out=next(folders)), quiet=True).tests["holdout"]
        return loader.manifest.paths

    everything = scan_images(image_folders["train"])
    for seed in (0, 3):
        assert held_out(seed=seed, data={"holdout": 9}) == everything.holdout(9, seed)[1].paths
        assert held_out(seed=seed, data={"holdout": 9, "holdout_seed": 5}) == everything.holdout(9, 5)[1].paths
    assert everything.holdout(9, 0) != everything.holdout(9, 3)


def test_validation_images_choose_the_best_epoch(change, image_folders):
    """As held-out images do, of a folder of their own."""
    trainer = Trainer(change(data={"val": image_folders["ood"]}, method={"name": "ft"}), quiet=True)
    everything = len(scan_images(image_folders["train"]))
    assert len(trainer.loader) == everything // trainer.config.optim.batch_size  # none of them is held out
    assert set(trainer.run()) == {"holdout", "id", "ood"}
    logged = metrics(trainer.folder, "accuracy/holdout")
    assert len(logged) == 3  # before the first epoch, and after each
    assert [line["accuracy/holdout"] for line in logged] == [line["accuracy/ood"] for line in logged]
    assert trainer.best == max(line["accuracy/holdout"] for line in logged[1:])
    assert read_run(trainer.folder).weights.name == "best.safetensors"
    change(data={"val": image_folders["ood"], "holdout": "paper"}).validate()  # as with a preset
    with pytest.raises(UserError, match=r"--data\.holdout 0"):
        change(data={"val": image_folders["ood"], "holdout": 3}).validate()


@pytest.mark.parametrize(("images", "held_out"), [(1, 0), (9, 1), (300, 30), (102_400, 10_240), (1_281_167, 10_240)])
def test_the_papers_share_of_any_data_set_is_held_out(monkeypatch, capsys, images, held_out):
    manifest = Manifest(Path("images"), ("a",), tuple(map(str, range(images))), (0,) * images)
    monkeypatch.setattr("maskcf_fast.training.build.scan_images", lambda *_, **__: manifest)
    processes = Processes(0, 1, torch.device("cpu"))
    config = DataConfig(train=Path("images"), holdout="paper")
    if not held_out:
        with pytest.raises(UserError, match=r"--data\.holdout"):
            scan(config, processes, 0)
        return
    train, tests = scan(config, processes, 0)
    assert (len(train), len(tests["holdout"])) == (images - held_out, held_out)
    assert (f"{held_out} of the {images} training images" in capsys.readouterr().err) == (held_out < 10_240)
    validated = scan(DataConfig(train=Path("images"), holdout="paper", val=Path("images")), processes, 0)
    assert [len(validated[0]), len(validated[1]["holdout"])] == [images, images]


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(change, monkeypatch):
    trainer = Trainer(change(log_every=4, checkpoint_every=2), quiet=True)
    real = trainer._optimizer_step

    def poison(micro):
        if trainer.step == 2:  # the third step
            with torch.no_grad():
                trainer.method.student.head.bias[0] = math.nan
        real(micro)

    monkeypatch.setattr(trainer, "_optimizer_step", poison)
    with pytest.raises(
        TrainingDiverged, match=r"NaN or infinite at step 3 of 10; the last good checkpoint is .*step-2"
    ):
        trainer.run()
    assert values(trainer.folder)["step"] == 2
    assert all(t.isfinite().all() for t in tensors(trainer.folder).values())


def test_full_disk_keeps_the_old_checkpoint(change, monkeypatch):
    trainer = Trainer(change(checkpoint_every=2), quiet=True)
    real = os.fsync

    def full(handle):
        if trainer.step >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*step-4/.*safetensors .*No space left on device"):
        trainer.run()
    assert values(trainer.folder)["step"] == 2
    assert not list(trainer.folder.rglob(".*")), "a half-written file is left"


def test_refuses_what_is_not_this_run(change):
    config = change(optim={"epochs": 1})
    Trainer(config, quiet=True).run()
    with pytest.raises(ValueError, match="already holds a run: --resume"):
        Trainer(config, quiet=True)

    resume = replace(config, resume=config.out)
    started = values(config.out)["initial"]
    rewrite(config.out, lambda v: v | {"initial": "0"})
    with pytest.raises(ValueError, match="started from other weights"):
        Trainer(resume, quiet=True)
    rewrite(config.out, lambda v: v | {"initial": started, "images": v["images"] | {"id": "0"}})
    with pytest.raises(ValueError, match=r"other images than those here now: id; put those back"):
        Trainer(resume, quiet=True)
    with pytest.raises(ValueError, match="seed"):
        Trainer(replace(resume, seed=5), quiet=True)


@pytest.mark.parametrize("fill", ["single", "multi"])
def test_batch_of_one_cannot_be_refilled(change, fill):
    config = change(method={"strategy": f"object-{fill}"}, optim={"batch_size": 1})
    with pytest.raises(ValueError, match="needs a micro-batch of at least 2 images, got 1"):
        Trainer(config, quiet=True)
    assert not config.out.exists()


def test_ruined_weights_are_not_saved(change):
    """One step with a huge learning rate: the loss before it was fine, the weights after it are not."""
    config = change(optim={"epochs": 1, "batch_size": 60, "lr": 1e30, "warmup": 0.0})
    trainer = Trainer(config, quiet=True)
    with pytest.raises(TrainingDiverged, match=r"weights are NaN or infinite after step 1 of 1; the last good"):
        trainer.run()
    assert values(config.out)["step"] == 0
    assert not (config.out / "model.safetensors").exists()


def test_a_file_in_place_of_a_folder_of_checkpoints(tmp_path):
    for place in ("whole/checkpoints", "one/checkpoints/step-4"):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.touch()
        with pytest.raises(ValueError, match=f"{path} is a file where a run has a folder: remove it"):
            prepare(tmp_path / Path(place).parts[0], AUTO)


def test_what_a_user_copies_beside_the_checkpoints_stays(tmp_path):
    for name in ("step-3", "step-6", "my-best", "step-9"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").touch()
    clean(tmp_path, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["my-best", "step-9"]


def test_out_never_overwrites(change, image_folders, tmp_path):
    """A folder with the user's files, a data folder, a file, a finished run without its checkpoint."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"own holds other files \(model.safetensors\): choose an empty or new folder"):
        Trainer(change(out=own), quiet=True)
    assert (own / "model.safetensors").read_bytes() == b"precious"
    with pytest.raises(ValueError, match="holds other files"):
        Trainer(change(out=image_folders["train"]), quiet=True)
    with pytest.raises(ValueError, match=r"cannot write to .*Not a directory\): choose another"):
        Trainer(change(out=own / "model.safetensors"), quiet=True)
    config = change(optim={"epochs": 1})
    Trainer(config, quiet=True).run()
    shutil.rmtree(config.out / "checkpoints")
    with pytest.raises(ValueError, match="holds other files"):
        Trainer(config, quiet=True)


def test_settings_reach_what_they_are_for(change):
    """Every setting that only changes numbers: a run would not fail without it."""
    config = change(
        method={"name": "kd", "weight": 2.5, "temperature": 4.0}, optim={"weight_decay": 0.3, "clip": 1e-6, "epochs": 1}
    )
    trainer = Trainer(config, quiet=True)
    assert (trainer.method.weight, trainer.method.temperature) == (2.5, 4.0)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.3}
    norms = []
    trainer.optimizer.register_step_pre_hook(lambda *_: norms.append(total_norm(trainer)))
    trainer.run()
    assert max(norms) == pytest.approx(1e-6, rel=1e-2)

    method = build_method(
        MethodConfig(strategy="object-multi", weight=1.5, top_k=3, start_layer=2), trainer.method.student
    )
    assert (method.weight, method.map.start_layer) == (1.5, 2)
    assert method.strategy == MaskStrategy("object", "multi", top_k=3)


def total_norm(trainer):
    return float(torch.stack([p.grad.norm() for p in trainer.method.student.parameters()]).norm())


def test_best_is_the_best_epoch_not_the_last(change, monkeypatch):
    accuracies = iter([60.0, 50.0, 50.0, 30.0])  # the first is the pre-trained model's, which is no epoch
    monkeypatch.setattr(trainer_module, "measure", lambda *_: SimpleNamespace(top1=next(accuracies)))
    config = change(optim={"epochs": 3})
    config = replace(config, data=replace(config.data, ood=()))
    trainer = Trainer(config, quiet=True)
    seen = {}
    monkeypatch.setattr(
        trainer_module, "save_full", lambda path, *_: seen.setdefault(path.name, []).append(trainer.step)
    )
    trainer.run()
    assert seen == {"best.safetensors": [5], "model.safetensors": [15]}
    assert values(config.out)["best"] == 50.0


BAD_VALUES = {
    "step": [10**9, -1, True, "5", None], "evaluated": [11, 0.5], "skipped": [-1, 99], "best": [101, "x"],
    "accuracy": [None, {"id": -1}], "initial": [None], "images": [7], "processes": [None, [], [{}], [{"loader": {}}]],
}  # fmt: skip
BAD_PROCESSES = {
    "loader": [None, "x", [[1]]], "settings": [None, "x"], "epoch": [None, "x", -1, 1.5], "batch": [True, 5, -1],
    "generator": [b"", b"abc", -1, "x"], "sums": [5, [1.0], [1.0, 2.0, "x", 4.0]],
}  # fmt: skip
BAD_TENSORS = {
    "another architecture than tiny": lambda t: {"student.x": torch.zeros(1)},
    "lacks the optimiser's state": lambda t: {k: v for k, v in t.items() if not k.startswith("optimizer.")},
    "student.head.bias is I64": lambda t: t | {"student.head.bias": t["student.head.bias"].long()},
    "holds NaN or infinity in student.head.bias": lambda t: (
        t | {"student.head.bias": t["student.head.bias"] * math.nan}
    ),
    r"head.bias.exp_avg is F32 \[1\]": lambda t: t | {"optimizer.student.head.bias.exp_avg": torch.zeros(1)},
    "head.bias had 1000000000": lambda t: t | {"optimizer.student.head.bias.step": torch.tensor(1e9)},
    "head.bias.exp_avg is nothing": lambda t: {
        k: v for k, v in t.items() if k != "optimizer.student.head.bias.exp_avg"
    },
}


def test_checkpoints_that_hold_what_no_run_does(change):
    """Their digests are right: somebody made them so."""
    config = change(optim={"epochs": 1})
    Trainer(config, quiet=True).run()
    resume = replace(config, resume=config.out)
    good = values(config.out), tensors(config.out)
    for name, bad in BAD_VALUES.items():
        for value in bad:
            rewrite(config.out, lambda v, name=name, value=value: v | {name: value})
            folder = config.out / "checkpoints" / "step-5"
            with pytest.raises(ValueError, match=rf"step-5 is damaged.*{name if value is not None else ''}"):
                Trainer(resume, quiet=True)
            shutil.rmtree(folder)
            save_checkpoint(config.out, 5, *good, ALONE, 9)
    for message, spoil in BAD_TENSORS.items():
        save_checkpoint(config.out, 5, good[0], spoil(dict(good[1])), ALONE, 9)
        with pytest.raises(ValueError, match=message):
            Trainer(resume, quiet=True)


BAD_INDEX = {
    "none": lambda x: None, "a list": lambda x: [x], "no rows": lambda x: x | {"rows": []},
    "rows of text": lambda x: x | {"rows": "abc"}, "a short row": lambda x: x | {"rows": [x["rows"][0][:2]]},
    "an empty row": lambda x: x | {"rows": [[]]}, "an open row": lambda x: x | {"rows": [[x["rows"][0][0], 0, None]]},
    "no such file": lambda x: x | {"rows": [["x.safetensors", 0, 3]]}, "twice": lambda x: x | {"rows": x["rows"] * 2},
    "a gap": lambda x: x | {"rows": [[x["rows"][0][0], 0, 1], [x["rows"][0][0], 2, 3]]},
    "pieces of another": lambda x: x | {"rows": [[x["rows"][0][0], 0, 1], [x["rows"][0][0], 1, 3]]},
    "backwards": lambda x: x | {"rows": [[x["rows"][0][0], *edges] for edges in ([0, 3], [3, 5], [5, 3])]},
    "another folder": lambda x: x | {"rows": [["../step-5/" + x["rows"][0][0], 0, 3]]},
    "a negative size": lambda x: x | {"shape": [0, -1], "rows": []}, "another dtype": lambda x: x | {"dtype": "F16"},
    "no such dtype": lambda x: x | {"dtype": "XX", "shape": [0], "rows": []},
    "before the first": lambda x: x | {"rows": [[x["rows"][0][0], -1, 3]]},
    "no shape": lambda x: {k: x[k] for k in ("dtype", "rows")}, "a number": lambda x: x | {"shape": 3},
    "texts": lambda x: x | {"shape": ["3"]}, "a dtype": lambda x: x | {"dtype": 7},
}  # fmt: skip


def test_places_of_tensors_that_no_run_writes(change):
    config = change(optim={"epochs": 1})
    Trainer(config, quiet=True).run()
    folder, name = config.out / "checkpoints" / "step-5", "student.head.bias"
    state = load_json(folder / "state.json")
    whole = read_checkpoint(folder).read(name)
    assert whole.shape == (3,)
    for rows in [(0, 4), (2, 1), (-1, 2)]:
        with pytest.raises(UserError, match=f"step-5 has no rows {rows[0]} to {rows[1]} of {name}"):
            read_checkpoint(folder).read(name, *rows)
    absent = state["tensors"] | {"absent": state["tensors"][name]}
    save_json(folder / "state.json", state | {"tensors": absent})
    with pytest.raises(UserError, match="step-5 does not hold all of absent"):
        read_checkpoint(folder).read("absent")
    for what, spoil in BAD_INDEX.items():
        index = state["tensors"] | {name: spoil(state["tensors"][name])}
        save_json(folder / "state.json", state | {"tensors": index})
        with pytest.raises(UserError, match="step-5"):
            pytest.fail(f"{what}: {read_checkpoint(folder).read(name)}")


def test_pieces_of_a_tensor_come_in_any_order(tmp_path):
    whole = torch.arange(10).view(5, 2)
    folder = tmp_path / "checkpoints" / "step-0"
    save_checkpoint(tmp_path, 0, {}, {"x": whole, "empty": whole[:0]}, ALONE, 1)
    state = load_json(folder / "state.json")
    [[first, _, _]] = state["tensors"]["x"]["rows"]
    save_tensors(folder / "a", {"x": whole[3:]})
    save_tensors(folder / "b", {"x": whole[:3]})
    save_tensors(folder / "c", {"x": whole[3:3]})
    state["tensors"]["x"]["rows"] = [["a", 3, 5], ["c", 3, 3], ["b", 0, 3]]
    save_json(folder / "state.json", state)
    saved = read_checkpoint(folder)
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(saved.read("x", start, stop), whole[start:stop])
            assert saved.read("x", start, stop).dtype == torch.int64
    assert saved.read("empty").shape == (0, 2)
    (folder / first).unlink()
    with pytest.raises(UserError, match="step-0 does not hold all of empty"):
        saved.read("empty")


def test_states_of_processes_that_no_run_writes(change):
    config = change(optim={"epochs": 1})
    Trainer(config, quiet=True).run()
    good = values(config.out), tensors(config.out)
    [state] = good[0]["processes"]
    for name, value in [(name, value) for name, bad in BAD_PROCESSES.items() for value in bad]:
        loader = {**state["loader"], name: value}
        spoiled = {**state, **({name: value} if name in state else {"loader": loader})}
        for elastic in {False, name == "settings"}:
            plain = good[0] | {"processes": [spoiled] * (1 + elastic)}
            save_checkpoint(config.out, 5, plain, good[1], ALONE, 9)
            with pytest.raises(UserError, match=rf"step-5 is damaged, .*({name}|RNG).*: remove it to continue"):
                Trainer(replace(config, resume=config.out, elastic=elastic), quiet=True)


def test_weights_and_heads_that_are_wrong(change, weights, tmp_path):
    state = load_file(weights)
    for name, tensor, message in [
        ("head.bias", torch.zeros(1), r"bias in .* is \[1\], not \[3\]"),
        ("head.weight", torch.zeros(3, 64, dtype=torch.int64), "must be of a float dtype"),
        ("backbone.class_embedding", torch.full((96,), math.nan), "hold NaN or infinity, first in backbone.class"),
    ]:
        save_file({**state, name: tensor}, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=message):
            Trainer(change(model={"weights": tmp_path / "bad.safetensors"}), quiet=True)
    save_file({**state, "head.bias": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "bias.safetensors")
    trainer = Trainer(change(model={"weights": tmp_path / "bias.safetensors"}), quiet=True)
    assert trainer.method.student.head.bias.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ({"strategy": "object-single"}, torch.bfloat16),
        ({"strategy": "object-single", "ema_teacher": 0.9}, torch.float32),  # it moves by less than bfloat16 tells
        ({"name": "l2-sp", "weight": 0.1}, torch.float32),  # distances are taken from it
    ],
)
def test_a_teacher_is_kept_in_bfloat16_where_nothing_is_lost(change, method, dtype):
    teacher = Trainer(change(method=method, precision="bf16"), quiet=True).method.teacher
    [backbone] = [module for module in teacher.modules() if isinstance(module, VisionTransformer)]
    weights = [backbone.patch_weight, backbone.blocks[0].fc.weight, backbone.blocks[-1].attn.qkv.weight]
    assert {weight.dtype for weight in weights} == {dtype}
    assert {backbone.blocks[0].fc.bias.dtype, backbone.position_embedding.dtype} == {torch.float32}
