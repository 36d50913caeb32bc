"""The command on tiny trained runs: results, what is kept, and what a user sees when something is wrong."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from coloured import write_shards
from runs import caller, metrics
from safetensors.torch import load_file

from maskcf_fast.core.tensors import save_tensors
from maskcf_fast.evaluate import main
from maskcf_fast.evaluation import report, suite
from maskcf_fast.evaluation.metrics import Baseline
from maskcf_fast.evaluation.suite import _identity
from maskcf_fast.methods import model_stock
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.training.runs import parse_alphas, read_run
from maskcf_fast.training.settings import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig
from maskcf_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folders, weights):
    """Two finished runs, "ft" and "fd", tested on the folders "id" and "ood"."""
    root = tmp_path_factory.mktemp("runs")
    data = DataConfig(image_folders["train"], image_folders["id"], (image_folders["ood"],), backend="torch", threads=0)
    optim = OptimConfig(epochs=2, batch_size=12, lr=1e-3)
    for name in ("ft", "fd"):
        method = MethodConfig(name, weight=1.0)
        config = TrainConfig(ModelConfig("tiny", weights), data, method, optim, root / name, device="cpu")
        Trainer(config, quiet=True).run()
    return root


@pytest.fixture
def call(tmp_path, capsys):
    """``call(*arguments)``: exit code, what was printed, and the results."""
    fixed = ("--out", tmp_path / "out", "--device", "cpu", "--backend", "torch", "--threads", "0")
    return caller(main, capsys, tmp_path / "out" / "results.json", *fixed)


def logged(run, step):
    """Accuracies that the trainer measured, by test set."""
    found = metrics(run, "accuracy/id")[step]
    return {name: found[f"accuracy/{name}"] for name in ("id", "ood")}


def test_a_run_with_its_wise_ft_curve(runs, call, tmp_path):
    run = runs / "ft"
    code, printed, results = call("--run", run, "--wise-ft", "0:1:0.5")
    assert code == 0
    assert results["id"] == "id"
    rows = {row["alpha"]: row for row in results["rows"]}
    assert list(rows) == [None, 0, 0.5, 1]
    # The trainer measured both ends.
    assert rows[None]["top1"] == rows[1]["top1"] == logged(run, -1)
    assert rows[0]["top1"] == logged(run, 0)
    assert rows[0.5]["ood_average"] == rows[0.5]["top1"]["ood"]
    assert rows[1]["ood_above_initial"] == rows[1]["top1"]["ood"] - rows[0]["top1"]["ood"]
    assert rows[0]["ood_above_initial"] == 0
    assert len(results["measurements"]) == 6  # α 1 is the run's own model
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.strip() in printed
    assert f"| ft | 0 | {logged(run, 0)['id']:.2f} | {logged(run, 0)['ood']:.2f} |" in table
    assert (tmp_path / "out" / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "best.safetensors",
        "model.safetensors",
    }  # fmt: skip


def test_picture_axes(runs, call, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "plot_tradeoff", lambda path, curves, title: drawn.append((curves, title)))
    assert call("--run", runs / "ft", "--wise-ft", "0")[0] == 0
    start, end = ([[value] for value in logged(runs / "ft", step).values()] for step in (0, -1))
    assert start[0] != start[1] or end[0] != end[1]
    assert drawn == [({"ft": [("", *end)], "WiSE-FT": [("0", *start)]}, "id against ood")]


def test_wise_ft_is_between_the_weights(runs):
    run = read_run(runs / "ft")
    start = load_file(run.config.model.weights)
    end = load_file(run.weights)
    models = run.models((0.0, 0.3, 1.0))
    assert next(models)[0] is None
    for alpha, model in models:
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, (1 - alpha) * start[name] + alpha * end[name], rtol=1e-6, atol=1e-6)
            if alpha in (0, 1):
                assert torch.equal(tensor, (start, end)[int(alpha)][name])


def test_model_stock_of_several_runs(runs, call, tmp_path, weights):
    both = ["--run", runs / "ft", runs / "fd"]
    code, _, results = call(*both, "--model-stock")
    assert code == 0
    assert [row["model"] for row in results["rows"]] == ["ft", "fd", "model stock"]
    model = read_run(runs / "ft").tuned()
    states = [load_file(runs / name / "model.safetensors") for name in ("ft", "fd")]
    model.load_state_dict(model_stock(load_file(weights), states))
    keys = {key.split("-")[0] for key, entry in results["measurements"].items() if entry["model"] == "model stock"}
    assert keys == {_identity(model)[:32]}
    shutil.copytree(runs / "fd", tmp_path / "other")
    config = (tmp_path / "other" / "config.yaml").read_text()
    (tmp_path / "other" / "config.yaml").write_text(
        config.replace(str(weights), "random").replace("\nseed: 0", "\nseed: 1")
    )
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    code, printed, _ = call("--run", runs / "ft", tmp_path / "other", "--model-stock")
    assert (code, "other started from other weights than" in printed) == (1, True)


def test_several_runs_and_effective_robustness(runs, call, image_folders, tmp_path):
    baseline = tmp_path / "baseline.yaml"
    baseline.write_text("shifted: {slope: 0.9, intercept: -0.2}\nelsewhere: {slope: 1, intercept: 0}\n")
    data = [f"plain={image_folders['train']}", f"shifted=folder:{image_folders['ood']}", f"{image_folders['id']}"]
    arguments = ["--run", runs / "ft", "--run", runs / "fd", "--data", *data, "--baseline", baseline, "--id", "id"]
    code, printed, results = call(*arguments)
    assert code == 0
    assert [row["model"] for row in results["rows"]] == ["ft", "fd"]
    for row in results["rows"]:
        top1 = row["top1"]
        assert list(top1) == ["plain", "shifted", "id"]
        assert (top1["id"], top1["shifted"]) == tuple(logged(runs / row["model"], -1).values())
        assert row["ood_average"] == pytest.approx((top1["plain"] + top1["shifted"]) / 2)
        expected = Baseline(0.9, -0.2).effective_robustness(top1["id"], top1["shifted"])
        assert row["effective_robustness"] == {"shifted": pytest.approx(expected)}
        assert row["ood_above_initial"] is None
    assert "id (folder, in distribution): 15 images of 3 classes" in printed
    assert "no baseline for plain" in printed
    assert "| id (ID) | plain | shifted | OOD average | effective robustness |" in printed


def test_finished_results_are_kept(runs, call, tmp_path, image_folders, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs / "ft", run)
    data = tmp_path / "data"
    shutil.copytree(image_folders["ood"], data)
    arguments = ["--run", run, "--data", f"a={image_folders['id']}", f"b={data}"]
    measured = []
    real = suite.measure

    def counted(model, benchmark, *rest):
        measured.append(benchmark.name)
        if measured == ["a", "b"]:
            raise KeyboardInterrupt
        return real(model, benchmark, *rest)

    monkeypatch.setattr(suite, "measure", counted)
    code, printed, results = call(*arguments)
    assert code == 130
    assert "the same command continues" in printed
    assert [m["data"] for m in results["measurements"].values()] == ["a"]
    measured.append("again:")
    _, printed, first = call(*arguments)
    assert measured[3:] == ["b"]
    assert "a: " in printed
    assert printed.count("(reused)") == 1
    assert call(*arguments)[2] == first
    assert measured[4:] == []
    # Other pixels under the same name; then other weights.
    shutil.copy(data / "cat" / "000.jpg", data / "dog" / "000.jpg")
    call(*arguments)
    assert measured[4:] == ["b"]
    torch.manual_seed(3)
    save_tensors(
        run / "model.safetensors", ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3)).state_dict()
    )
    _, _, other = call(*arguments)
    assert measured[5:] == ["a", "b"]
    assert other["rows"] != first["rows"]
    assert len(other["measurements"]) == 5  # earlier ones stay
    call(*arguments, "--precision", "bf16")
    assert measured[7:] == ["a", "b"]


def test_best_model_where_held_out_images_chose_it(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "ft", run)
    assert read_run(run).weights.name == "model.safetensors"
    assert read_run(run, "best").weights.name == "best.safetensors"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["holdout"] = 6
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert read_run(run).weights.name == "best.safetensors"
    assert read_run(run, "final").weights.name == "model.safetensors"
    (run / "best.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no best\.safetensors: .*--weights final"):
        read_run(run)


def test_classes_from_a_file(runs, call, tmp_path, image_folders):
    """A run on a machine that has no training images; its classes in another order than the folders'."""
    run = tmp_path / "run"
    shutil.copytree(runs / "ft", run)
    text = (run / "config.yaml").read_text().replace(str(image_folders["train"]), "/absent")
    (run / "config.yaml").write_text(text)
    assert read_run(run).classes == ("cat", "dog", "owl")  # its file names them
    save_tensors(run / "model.safetensors", load_file(run / "model.safetensors"))  # as an earlier version did
    code, printed, _ = call("--run", run)
    assert code == 1
    assert "the names of the model's 3 classes are not known" in printed
    assert "--classes FILE" in printed
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog\nowl\n")
    code, _, results = call("--run", run, "--classes", names)
    assert results["rows"][0]["top1"] == logged(run, -1)
    names.write_text("owl\ncat\ndog\n")
    _, _, rotated = call("--run", run, "--classes", names)
    by_name = {m["data"]: m for m in rotated["measurements"].values()}
    assert set(by_name) == {"id", "ood"}
    assert rotated["rows"][0]["top1"] != results["rows"][0]["top1"]
    for content, words in (
        ("cat\ndog\n", "3 outputs, but --classes .* has 2 classes"),
        ("cat\ncat\ndog\n", "names 'cat' more than once"),
        ("", "holds no class names"),
    ):
        names.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_run(run, classes=str(names))
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="3 outputs, but --classes imagenet has 1000 classes"):
        read_run(run, classes="imagenet")


def test_a_run_trained_and_tested_on_shards(runs, call, tmp_path, image_folders):
    """The same images in shards: the same accuracies, whether the classes are found in the weights or the shards."""
    index = {"cat": "0", "dog": "1", "owl": "2"}
    shards = {name: write_shards(tmp_path / name, image_folders[name], index.get) for name in ("train", "id", "ood")}
    for name in shards:
        (tmp_path / name / "classes.txt").write_text("cat\ndog\nowl\n")
    run = tmp_path / "run"
    shutil.copytree(runs / "ft", run)
    text = (run / "config.yaml").read_text()
    for name, pattern in shards.items():
        text = text.replace(str(image_folders[name]), pattern)
    (run / "config.yaml").write_text(text)
    _, _, results = call("--run", run, "--wise-ft", "0")
    assert [row["top1"] for row in results["rows"]] == [logged(run, -1), logged(run, 0)]
    assert {entry["path"] for entry in results["data"]} == {str(tmp_path / "id"), str(tmp_path / "ood")}
    save_tensors(run / "model.safetensors", load_file(run / "model.safetensors"))  # without the classes' names
    assert read_run(run).classes == ("cat", "dog", "owl")
    assert call("--run", run, "--data", f"again={tmp_path / 'ood'}")[2]["rows"][0]["top1"] == {
        "again": logged(run, -1)["ood"]
    }


def test_published_layouts_with_a_real_run(runs, call, tmp_path, image_folders, wnids):
    """Its three classes pass for ImageNet's 1st, 3rd and 11th; V2 sorts their numbers 0, 10, 2."""
    names = dict(zip(("cat", "dog", "owl"), (0, 2, 10), strict=True))
    (tmp_path / "classes.txt").write_text("\n".join(wnids[n] for n in names.values()))
    for layout in ("imagenet-v2", "imagenet", "imagenet-r"):
        for name, number in names.items():
            folder = str(number) if layout == "imagenet-v2" else wnids[number]
            shutil.copytree(image_folders["id"] / name, tmp_path / layout / folder)
    data = [tmp_path / "imagenet-r", f"imagenet-v2={tmp_path / 'imagenet-v2'}", f"imagenet:{tmp_path / 'imagenet'}"]
    code, _, results = call("--run", runs / "ft", "--classes", tmp_path / "classes.txt", "--data", *data)
    assert code == 0
    assert results["id"] == "imagenet"  # not the first
    assert [entry["layout"] for entry in results["data"]] == ["imagenet-r", "imagenet-v2", "imagenet"]
    assert set(results["rows"][0]["top1"].values()) == {logged(runs / "ft", -1)["id"]}


def test_names_of_another_data_set(runs, call, tmp_path, image_folders):
    other = tmp_path / "other"
    shutil.copytree(image_folders["id"], other)
    (other / "owl").rename(other / "Eule")
    code, printed, _ = call("--run", runs / "ft", "--data", other)
    assert code == 1
    assert "'Eule'; --outside skip leaves their images out, --class-map FILE translates names" in printed
    (tmp_path / "map.yaml").write_text("Eule: owl\n")
    _, _, results = call("--run", runs / "ft", "--data", other, "--class-map", tmp_path / "map.yaml")
    assert results["rows"][0]["top1"]["other"] == logged(runs / "ft", -1)["id"]
    code, printed, results = call("--run", runs / "ft", "--data", f"skipped={other}", "--outside", "skip")
    assert results["data"][0]["images"] == 10
    assert "their images are left out" in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "tradeoff.png").exists()  # one data set: no trade-off
    (tmp_path / "map.yaml").write_text("- owl\n")
    code, printed, _ = call("--run", runs / "ft", "--data", other, "--class-map", tmp_path / "map.yaml")
    assert (code, "must hold the model's class" in printed) == (1, True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "--run DIR is missing"),
        ("--run /absent", "/absent is no run: it has no config.yaml"),
        ("{run} {runs}/ft", "names a folder twice"),
        ("{run} --data x=/absent", "no data set folder /absent (for x)"),
        ("{run} --data {ood} {ood}", "several test sets are called 'ood'"),
        ("{run} --id odo", "--id: unknown test set 'odo' (there are id, ood); did you mean 'ood'?"),
        ("{run} --model-stock", "--model-stock needs at least two runs"),
        ("{run} --wise-ft 0:1", "neither FIRST:LAST:STEP, such as 0:1:0.1, nor A,B,C"),
        ("{run} --wise-ft 0,1.5", "every α must lie in [0, 1]"),
        ("{run} --baseline {ood}/b.yaml", "no baseline at"),
        ("{run} --baseline {tmp}/b.yaml", "unknown test set 'odo' (there are id, ood); did you mean"),
        ("{run} --classes /absent.txt", "/absent.txt: no such file"),
        ("{run} --batch-size 0", "batch_size must be from 1 to"),
    ],
)
def test_bad_settings(line, words, runs, call, image_folders, tmp_path):
    (tmp_path / "b.yaml").write_text("odo: {slope: 1, intercept: 0}")
    line = line.format(run=f"--run {runs}/ft", runs=runs, ood=image_folders["ood"], tmp=tmp_path)
    code, printed, results = call(*line.split())
    assert code == 1
    assert words in printed
    assert results is None


def test_unfinished_and_damaged_runs(runs, call, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "ft", run)
    (run / "model.safetensors").write_bytes(b"half")
    assert "no complete model of a run" in call("--run", run)[1]
    (run / "model.safetensors").unlink()
    assert "it has not finished: continue it" in call("--run", run)[1]


def test_initial_weights_that_are_gone_or_changed(runs, call, tmp_path, weights):
    run = tmp_path / "run"
    shutil.copytree(runs / "ft", run)
    own = tmp_path / "start.safetensors"
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(str(weights), str(own)))
    code, printed, _ = call("--run", run, "--wise-ft", "0")
    assert code == 1
    assert f"no weights at {own}" in printed
    assert "put back the weights that" in printed
    torch.manual_seed(4)
    save_tensors(own, ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3)).state_dict())
    assert "no longer holds the weights that" in call("--run", run, "--wise-ft", "0")[1]
    shutil.copy(weights, own)
    assert call("--run", run, "--wise-ft", "0")[0] == 0


def test_files_of_others_are_not_overwritten(runs, call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("[1]")
    code = main(["--run", str(runs / "ft"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert code == 1
    assert (tmp_path / "out" / "results.json").read_text() == "[1]"
    for command in ("table", "demo"):
        theirs = f'{{"version": 1, "command": "{command}", "measurements": {{}}}}'
        (tmp_path / "out" / "results.json").write_text(theirs)
        code, printed, results = call("--run", runs / "ft")
        assert (code, results) == (1, json.loads(theirs))
        assert f"holds the results of {command}, not of evaluate: choose another --out" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_a_folder_that_cannot_be_written_is_found_at_once(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "measure", None)  # calling it would be another error
    (tmp_path / "file").touch()
    assert main(["--run", str(runs / "ft"), "--device", "cpu", "--out", str(tmp_path / "file" / "out")]) == 1
    assert f"cannot write to {tmp_path}/file/out (Not a directory): choose another --out" in capsys.readouterr().err
    (tmp_path / "results.json").mkdir()
    assert main(["--run", str(runs / "ft"), "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "results.json is a folder: choose another --out, or remove it" in capsys.readouterr().err


def test_bad_images_name_the_commands_own_option(runs, call, tmp_path, image_folders):
    shutil.copytree(image_folders["ood"], tmp_path / "data")
    (tmp_path / "data" / "cat" / "000.jpg").write_bytes(b"no image")
    code, printed, _ = call("--run", runs / "ft", "--data", tmp_path / "data")
    assert (code, "(of python -m maskcf_fast.evaluate: --on-bad-image skip)" in printed) == (1, True)
    code, _, results = call("--run", runs / "ft", "--data", tmp_path / "data", "--on-bad-image", "skip")
    assert (code, results["data"][0]["images"]) == (0, 14)


def test_models_that_are_not_finite(runs, call, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "ft", run)
    model = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    with torch.no_grad():
        model.backbone.projection.fill_(1.0)
        model.backbone.ln_post.weight.zero_()
        model.backbone.ln_post.bias.fill_(1.0)  # every feature is 1/8 in all 64 places
        model.head.weight.fill_(3e38)  # finite, but not what comes of it
    save_tensors(run / "model.safetensors", model.state_dict())
    code, printed, _ = call("--run", run)
    assert code == 1
    assert "run on id: the model's outputs are NaN or infinite for" in printed


def test_runs_of_the_same_name(runs, call, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "ft", tmp_path / name / "ft")
    _, _, results = call("--run", tmp_path / "one" / "ft", tmp_path / "two" / "ft")
    assert [row["model"] for row in results["rows"]] == ["one/ft", "two/ft"]


@pytest.mark.parametrize(
    ("text", "alphas"),
    [
        ("", ()),
        ("0.5", (0.5,)),
        ("1,0,0.5,0.5", (0, 0.5, 1)),
        ("0:1:0.1", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)),
        ("0.2:0.5:0.2", (0.2, 0.4)),
    ],
)
def test_alphas(text, alphas):
    assert parse_alphas(text) == alphas


def test_too_many_alphas():
    assert len(parse_alphas("0.001:1:0.001")) == 1000
    for text in ("0:1:0.001", "0:1:1e-9", "0:1:1e-320", "0:inf:1"):
        with pytest.raises(ValueError, match=f"--wise-ft {text} is more than 1000 values: take a larger STEP"):
            parse_alphas(text)


@pytest.mark.parametrize("text", ["a", "0:1", "0:1:0", "1:0:0.1", "0:1:-1", "-1", "0,,1", "nan", "0:1:nan"])
def test_bad_alphas(text):
    with pytest.raises(ValueError, match="--wise-ft"):
        parse_alphas(text)


def test_several_processes_give_the_same_results(runs, call, tmp_path):
    single = call("--run", runs / "ft")[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Without "--", torchrun takes --run for an abbreviation of its own --run-path.
    command += ["-m", "--", "maskcf_fast.evaluate", "--run", str(runs / "ft"), "--out", str(tmp_path / "two")]
    command += ["--device", "cpu", "--backend", "torch", "--threads", "0"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    double = json.loads((tmp_path / "two" / "results.json").read_text())
    assert double["rows"] == single["rows"]
    for key, expected in single["measurements"].items():
        found = double["measurements"][key]
        assert found.pop("ece") == pytest.approx(expected.pop("ece"), abs=1e-4)
        assert found == expected
