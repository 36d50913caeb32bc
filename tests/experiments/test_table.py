"""The table: its runs, their reuse, and what it prints; its test sets are in evaluation/test_table_sets.py."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

import maskcf_fast.configs
from maskcf_fast.core.tensors import fingerprint, save_tensors
from maskcf_fast.evaluation.suite import _identity
from maskcf_fast.experiments.table import (
    DERIVED,
    FURTHER,
    METHODS,
    TRAINED,
    Table,
    TableConfig,
    TableRow,
    curves,
    markdown,
)
from maskcf_fast.methods import FILLS, strategy_names
from maskcf_fast.table import main
from maskcf_fast.training import Trainer
from maskcf_fast.training.checkpoint import ALONE, load_checkpoint
from maskcf_fast.training.runs import read_run
from maskcf_fast.training.settings import TrainConfig, find_yaml, parse
from maskcf_fast.visualization.plots import draw_tradeoff


def test_markdown():
    rows = [
        TableRow("ft", 0, {"id": 80.0, "v2": 60.0, "a": 20.0}),
        TableRow("ft", 1, {"id": 82.0, "v2": 64.0, "a": 20.0}),
        TableRow("soup", None, {"id": 83.0, "v2": 62.0, "a": 30.0}),
    ]
    assert markdown(rows, "id").splitlines() == [
        "| method | id (ID) | v2 | a | OOD average |",
        "|---|--:|--:|--:|--:|",
        "| ft | 81.0 ± 1.4 | 62.0 ± 2.8 | 20.0 ± 0.0 | 41.0 ± 1.4 |",
        "| soup | 83.0 | 62.0 | 30.0 | 46.0 |",
    ]
    assert markdown(rows, "v2").splitlines()[::4] == [
        "| method | v2 (ID) | id | a | OOD average |",
    ]
    assert rows[0].shifted("v2") == 50.0


@pytest.fixture
def line(image_folders, weights, tmp_path):
    f = image_folders
    return [
        *("--data.train", str(f["train"]), "--data.id", str(f["id"]), "--data.ood", str(f["ood"])),
        *("--data.backend", "torch", "--data.threads", "0", "--model.arch", "tiny", "--model.weights", str(weights)),
        *("--optim.epochs", "1", "--optim.batch-size", "12", "--device", "cpu", "--out", str(tmp_path / "table")),
    ]


def test_runs_are_reused_and_derived_rows_agree(line, tmp_path):
    chosen = ["--methods", "zero-shot", "lp-ft", "ft", "wise-ft", "ensemble", "soup", "--alphas", "0", "1"]
    assert main([*line, *chosen, "--seeds", "0"]) == 0
    out = tmp_path / "table"
    results = json.loads((out / "table.json").read_text())
    started = load_checkpoint(out / "lp-ft-seed0").values["initial"]
    assert started == fingerprint(read_run(out / "lp-seed0").tuned()) != fingerprint(read_run(out / "ft-seed0").tuned())
    found = {row["method"]: row["accuracy"] for row in results["rows"]}
    assert found["wise-ft α 0"] == found["zero-shot"]
    assert found["wise-ft α 1"] == found["soup"] == found["ft"]
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert {path.parent.name for path in written} == {"lp-seed0", "ft-seed0", "lp-ft-seed0"}
    assert main([*line, *chosen, "--seeds", "0"]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads((out / "table.json").read_text()) == results
    assert results["id"] == "id"
    logged = [json.loads(line) for line in (out / "ft-seed0" / "metrics.jsonl").read_text().splitlines()]
    by_step = [{name: line[f"accuracy/{name}"] for name in ("id", "ood")} for line in logged if "accuracy/id" in line]
    assert (found["zero-shot"], found["ft"]) == (by_step[0], by_step[-1])  # as the trainer measured them


def test_weights_and_presets_of_ones_own(line, tmp_path, capsys):
    own = tmp_path / "teacher-map.yaml"
    own.write_text("method:\n  strategy: object-single\n  cam_source: teacher\n")
    assert main([*line, "--methods", "fd:0.5", "fd:2", str(own), f"{own}:3", "--seeds", "0"]) == 0
    rows = json.loads((tmp_path / "table/table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["fd 0.5", "fd 2", "teacher-map", "teacher-map 3"]
    methods = [read_run(tmp_path / f"table/{row['method'].replace(' ', '-')}-seed0").config.method for row in rows]
    assert [(m.name, m.cam_source, m.weight) for m in methods] == [
        ("fd", "student", 0.5), ("fd", "student", 2.0),
        ("counterfactual", "teacher", None), ("counterfactual", "teacher", 3.0),
    ]  # fmt: skip
    for row in rows:
        for name, counts in row["per_class"].items():
            images, right = map(sum, zip(*counts.values(), strict=True))
            assert row["accuracy"][name] == pytest.approx(100 * right / images)
    other = tmp_path / "other.yaml"
    for content, setting in (("precision: bf16", "precision"), ("data:\n  exif: false", "data.exif")):  # of no effect
        other.write_text(content)
        assert main([*line, "--methods", str(other)]) == 1
        assert f"{other} sets {setting}, which is of the whole table" in capsys.readouterr().err
    for wrong, message in (("fd:heavy", "NAME:WEIGHT"), ("wise-ft:1", "takes no weight"), ("fd:-1", "takes no weight")):
        assert main([*line, "--methods", wrong]) == 1
        assert message in capsys.readouterr().err


def test_several_processes(line, tmp_path):
    """They train and measure together; one process measures the same on the runs that they leave."""
    chosen = ["--methods", "lp-ft", "ft", "wise-ft", "soup", "--seeds", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "--", "maskcf_fast.table", *line, *chosen]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| method | id (ID) | ood | OOD average |") == 1
    out = tmp_path / "table"
    together = json.loads((out / "table.json").read_text())
    (out / "results.json").unlink()
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert main([*line, *chosen]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads((out / "table.json").read_text()) == together


def test_other_settings_are_refused(line, capsys):
    chosen = ["--methods", "ft", "--seeds", "0"]
    assert main([*line, *chosen]) == 0
    assert main([*line, *chosen, "--optim.lr", "0.5"]) == 1
    assert "--optim.lr (was 3e-05, is 0.5)" in capsys.readouterr().err


def test_other_weights_or_images_are_refused(line, image_folders, weights, tmp_path, capsys):
    train, own, table = tmp_path / "train", tmp_path / "own.safetensors", tmp_path / "table"
    shutil.copytree(image_folders["train"], train)
    shutil.copy(weights, own)
    line = [*line, "--data.train", str(train), "--model.weights", str(own), "--methods", "lp-ft", "--seeds", "0"]

    def refused(run):
        assert main(line) == 1
        message = f"{run} holds a run with other settings (other data or initial weights): choose another --out"
        return message in capsys.readouterr().err

    assert main(line) == 0
    probe = table / "lp-seed0" / "model.safetensors"
    for path, run in ((own, "lp-seed0"), (probe, "lp-ft-seed0")):
        before = path.read_bytes()
        save_tensors(path, {name: tensor + 1e-3 for name, tensor in load_file(path).items()})
        assert refused(table / run)
        path.write_bytes(before)
        assert main(line) == 0
    image = train / "cat" / "000.jpg"
    before = image.read_bytes()
    Image.new("RGB", (40, 36)).save(image)
    assert refused(table / "lp-seed0")
    image.write_bytes(before)
    own.unlink()
    assert main(line) == 1
    assert f"no weights at {own}: restore them" in capsys.readouterr().err


def test_damaged_runs_are_named(line, tmp_path, capsys):
    line = [*line, "--methods", "ft", "--seeds", "0"]
    assert main(line) == 0
    run = tmp_path / "table" / "ft-seed0"
    whole = {name: (run / name).read_text() for name in ("result.json", "config.yaml")}
    for name, contents in {"result.json": ("[]", '{"basis": ""}', "", "3"), "config.yaml": ("", "[1]", None)}.items():
        for content in contents:
            (run / name).unlink()
            if content is not None:
                (run / name).write_text(content)
            assert main(line) == 1
            assert f"{run} holds a finished run that cannot be read" in capsys.readouterr().err
            (run / name).write_text(whole[name])
    earlier = json.loads(whole["result.json"])  # of a version that did not keep what a run started from
    del earlier["initial"]
    (run / "result.json").write_text(json.dumps(earlier))
    assert main(line) == 0


def test_folders_of_others_are_refused(line, tmp_path, capsys):
    """Before anything is trained."""
    chosen = ["--methods", "ft", "--seeds", "0"]
    (tmp_path / "file").touch()
    assert main([*line, *chosen, "--out", str(tmp_path / "file" / "table")]) == 1
    assert f"cannot write to {tmp_path}/file/table (Not a directory): choose another" in capsys.readouterr().err
    out = tmp_path / "table"
    (out / "results.json").mkdir(parents=True)
    assert main([*line, *chosen]) == 1
    assert "results.json is a folder: choose another --out" in capsys.readouterr().err
    (out / "results.json").rmdir()
    for command in ("demo", "evaluate"):
        (out / "results.json").write_text(f'{{"command": "{command}"}}')
        assert main([*line, *chosen]) == 1
        assert f"holds the results of {command}, not of table: choose another --out" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["results.json"]


def test_mistakes(line, capsys):
    for arguments, message in (
        (["--methods", "objct-single"], "did you mean 'object-single'?"),
        (["--seeds", "1", "1"], "--seeds needs at least one seed, and none twice"),
        (["--seeds", str(2**31)], f"--seeds must be from 0 to {2**31 - 1}, got {2**31}"),
        (["--alphas", "1.5"], "[0, 1], got 1.5"),
        (["--methods", "wise-ft", "--alphas"], "--alphas needs at least one for wise-ft"),
        (
            ["--demo", "--optim.weight-decay", "0", "--precision", "bf16"],
            "leave out --model.arch, --model.weights, --data.train, --data.id, --data.ood, --data.backend, "
            "--data.threads, --optim.epochs, --optim.batch-size, --optim.weight-decay, --precision, or --demo",
        ),
        (["--quick"], "add --demo"),
    ):
        assert main([*line, *arguments]) == 1
        assert message in capsys.readouterr().err


def test_every_trained_method_has_a_preset():
    assert {*METHODS, *FURTHER, "model-stock"} == {*TRAINED, *DERIVED}
    for method in set(TRAINED) - {"lp-ft", *strategy_names()}:
        assert find_yaml(method).stem == method


def test_a_fill_that_is_registered_later_makes_rows(monkeypatch):
    monkeypatch.setitem(FILLS, "later", dataclasses.replace(FILLS["single"], name="later"))
    data = dataclasses.replace(TableConfig().data, train=Path("train"))
    TableConfig(("object-later", "random-later:2", "wise:context-later"), data=data).validate()
    with pytest.raises(ValueError, match="did you mean 'object-none'"):
        TableConfig(("object-nine",), data=data).validate()


def test_settings_of_every_method(tmp_path):
    made = Table.__new__(Table)
    made.config, made.base = TableConfig(out=tmp_path), TrainConfig()
    for method in TRAINED:
        config = made.settings(method, 3)
        assert (config.seed, config.out) == (3, tmp_path / f"{method}-seed3")
        name = method.partition("-")[0] if method in FURTHER else method
        name = {"lp-ft": "ft"}.get(name, "counterfactual" if method in strategy_names() else name)
        assert config.method.name == name
        assert name != "counterfactual" or config.method.strategy == method
        own = {"ft-ema", "ft-average", "ft-lora", "ft-last-blocks", "ft-layer-decay"}
        assert (config.optim != made.base.optim) == (method in own)
        assert (config.data != made.base.data) == (method in {"ft-mixup", "ft-randaugment"})
        assert config.data.holdout == 0
        if method in strategy_names() and (Path(maskcf_fast.configs.__path__[0]) / f"{method}.yaml").is_file():
            assert config.method == parse(["--config", method]).method
        config.validate()
        probe = tmp_path / "lp-seed3" / "model.safetensors"
        expected = dataclasses.replace(TrainConfig().model, weights=probe) if method == "lp-ft" else TrainConfig().model
        assert config.model == expected


def test_further_rows(line, tmp_path, capsys):
    """Model Stock of two seeds; and WiSE-FT of any method, whose α the held-out images choose."""
    chosen = ["--methods", "model-stock", "wise:fd:0.5", "ft-lora", "--seeds", "0", "1", "--data.holdout", "12"]
    line = [*line, "--optim.lr", "3e-3"]
    assert main([*line, *chosen]) == 0
    out = tmp_path / "table"
    names = ["wise:fd 0.5", "ft-lora"]
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [*names, *names, "model-stock"]
    assert {path.parent.name for path in out.glob("*/model.safetensors")} == {
        f"{name}-seed{seed}" for name in ("ft", "fd-0.5", "ft-lora") for seed in (0, 1)
    }
    measured = json.loads((out / "results.json").read_text())["measurements"]
    own = {key: e for key, e in measured.items() if e["model"] == "wise:fd 0.5" and e["seed"] == 1}
    held_out = {e["alpha"]: e["top1"] for e in own.values() if e["data"] == "holdout"}
    assert sorted(held_out) == [i / 10 for i in range(11)]
    alpha = min(a for a, value in held_out.items() if value == max(held_out.values()))
    *_, (_, model) = read_run(out / "fd-0.5-seed1", "final").models([alpha])
    assert {key.split("-")[0] for key, e in own.items() if e["data"] == "ood"} == {_identity(model)[:32]}
    for best in out.glob("fd-0.5-seed*/best.safetensors"):
        best.unlink()  # it is of the last epoch, not the best
    assert main([*line, "--methods", "wise:fd:0.5", "--seeds", "0", "1", "--data.holdout", "12"]) == 0
    for wrong, message in (
        (["wise:object-single"], "needs images to choose its α with: --data.holdout N or --data.val DIR"),
        (["wise:zero-shot"], "unknown method 'zero-shot'"),
        (["model-stock", "--seeds", "0"], "model-stock needs at least two seeds"),
        (["model-stock", "--seeds", "0", "1", "--model.weights", "random"], "model-stock needs runs from one start"),
        (["l2-sp", "--optim.lora-rank", "2"], "rests the weights that l2-sp"),
    ):
        assert main([*line, "--methods", *wrong]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("exif", [True, False])
def test_all_images_are_turned_or_none(change, tmp_path, exif):
    config = change(data={"exif": exif, "holdout": 9})
    trainer = Trainer(config, quiet=True)
    table = Table(TableConfig(model=config.model, data=config.data, out=tmp_path / "table", device="cpu"), ALONE)
    loaders = [trainer.loader, *trainer.tests.values()]
    sources = [loader.manifest for loader in loaders] + [benchmark.source for benchmark in table.suite.benchmarks]
    assert [source.upright for source in sources] == [exif] * 6


def test_soup_and_zero_shot_take_every_seed(line, tmp_path):
    """Told by the weights that were measured: the mean of both seeds', and a random head for each seed."""
    line = [*line, "--model.weights", "random", "--methods", "zero-shot", "soup", "--seeds", "0", "1"]
    assert main(line) == 0
    measured = json.loads((tmp_path / "table" / "results.json").read_text())["measurements"]
    assert [entry["model"] for entry in measured.values()] == ["zero-shot"] * 4 + ["soup"] * 2
    runs = [read_run(tmp_path / "table" / f"ft-seed{seed}") for seed in (0, 1)]
    first, second = (load_file(run.weights) for run in runs)
    model = runs[0].tuned()
    model.load_state_dict({name: (first[name] + second[name]) / 2 for name in first})
    keys = {key.split("-")[0] for key, entry in measured.items() if entry["model"] == "soup"}
    assert keys == {_identity(model)[:32]}
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_pictures_axes():
    """Accuracy in distribution to the right, means over the shifted sets upwards."""
    rows = [TableRow("ft", seed, {"id": 80.0 + seed, "v2": 60.0, "a": 20.0 + seed}) for seed in (0, 1)]
    axes = Figure().subplots()
    draw_tradeoff(axes, curves([*rows, TableRow("wise-ft α 0.5", 0, {"id": 75.0, "v2": 70.0, "a": 30.0})], "id"))
    drawn = {line.get_label(): [*line.get_xdata(), *line.get_ydata()] for line in axes.lines}
    assert drawn == {"FT": [80.5, 40.25], "WiSE-FT": [75.0, 50.0]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ID accuracy (%)", "OOD accuracy (%)")
