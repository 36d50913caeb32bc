"""The table on test sets in the published layouts: what `evaluate` finds on the same weights, kept and resumed."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured import write_objectnet, write_shards
from PIL import Image
from runs import caller

from maskcf_fast.data.transforms import resize_and_crop
from maskcf_fast.evaluate import main as evaluate
from maskcf_fast.evaluation import suite
from maskcf_fast.table import main
from maskcf_fast.training.runs import read_run

NUMBERS = {"cat": 2, "dog": 10, "owl": 414}  # as whose images the three classes' pass; as strings, "10" precedes "2"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory, image_folders, wnids):
    """Folders: train, val and sketch by WordNet id, v2 by number, r with two classes, shards of val, and objectnet."""
    root = tmp_path_factory.mktemp("published")
    for name, source in {"train": "train", "val": "id", "v2": "ood", "r": "ood", "sketch": "train"}.items():
        for folder, number in NUMBERS.items():
            if name != "r" or folder != "owl":
                to = str(number) if name == "v2" else wnids[number]
                shutil.copytree(image_folders[source] / folder, root / name / to)
    write_shards(root / "shards", root / "val")
    objectnet = write_objectnet(root / "objectnet")
    for folder in ("alarm_clock", "drill"):  # without classes among these three
        shutil.rmtree(objectnet / "images" / folder)
    return root


@pytest.fixture
def sets(data):
    pattern = f"shards={data}/shards/{{0..1}}.tar"
    return [f"imagenet-v2:{data}/v2", f"imagenet:{data}/val", f"imagenet-r:{data}/r", pattern]


@pytest.fixture
def call(data, weights, tmp_path, capsys):
    """``call(*arguments)``: exit code, what was printed, and the table."""
    fixed = [
        *("--data.train", data / "train", "--data.backend", "torch", "--data.threads", "0", "--device", "cpu"),
        *("--model.arch", "tiny", "--model.weights", weights, "--optim.epochs", "1", "--optim.batch-size", "12"),
        *("--optim.lr", "1e-3", "--out", tmp_path / "table"),
    ]

    return caller(main, capsys, tmp_path / "table" / "table.json", *fixed)


def test_every_row_is_what_evaluate_finds(call, sets, tmp_path):
    methods = ["zero-shot", "ft", "wise-ft", "ensemble", "soup", "lp"]
    code, printed, table = call("--test", *sets, "--methods", *methods, "--seeds", "0", "1", "--alphas", "0.5")
    assert code == 0
    assert table["id"] == "imagenet"  # by its layout, not the first
    assert [entry["layout"] for entry in table["data"]] == ["imagenet-v2", "imagenet", "imagenet-r", "folder"]
    assert {row["seed"] for row in table["rows"] if row["method"] == "soup"} == {None}
    rows = {(row["method"], row["seed"]): row["accuracy"] for row in table["rows"]}
    options = ["--device", "cpu", "--backend", "torch", "--threads", "0", "--out", str(tmp_path / "evaluation")]
    for method in ("ft", "lp"):
        for seed in (0, 1):
            run = tmp_path / "table" / f"{method}-seed{seed}"
            assert evaluate(["--run", str(run), "--data", *sets, "--wise-ft", "0,0.5", *options]) == 0
            found = json.loads((tmp_path / "evaluation" / "results.json").read_text())["rows"]
            by_alpha = {row["alpha"]: row["top1"] for row in found}
            assert rows[method, seed] == by_alpha[None]
            assert rows["zero-shot", seed] == by_alpha[0]
            if method == "ft":
                assert rows["wise-ft α 0.5", seed] == by_alpha[0.5]
    for accuracy in rows.values():
        assert accuracy["shards"] == accuracy["imagenet"]  # the same images
    line = next(line for line in printed.splitlines() if line.startswith("| soup"))
    shown = [rows["soup", None][name] for name in ("imagenet", "imagenet-v2", "imagenet-r", "shards")]
    assert line == "| soup | " + " | ".join(f"{value:.1f}" for value in [*shown, sum(shown[1:]) / 3]) + " |"
    assert "| method | imagenet (ID) | imagenet-v2 | imagenet-r | shards | OOD average |" in printed
    assert "not comparable with published results" in (tmp_path / "table" / "table.md").read_text()


def test_accuracies_counted_by_hand(call, sets, data, wnids, tmp_path):
    """Predictions on V2 among all three classes, on R among its two, without any of the package's evaluation."""
    code, _, table = call("--test", *sets, "--methods", "ft", "ensemble", "--seeds", "0", "--optim.lr", "1e-2")
    assert code == 0
    found = {row["method"]: row["accuracy"] for row in table["rows"]}
    run = read_run(tmp_path / "table" / "ft-seed0")
    models = run.tuned().eval(), run.initial().eval()
    outputs = sorted(NUMBERS, key=lambda name: wnids[NUMBERS[name]])  # in the order of the training folders
    for name, folder, choices in (
        ("imagenet-v2", "v2", outputs),
        ("imagenet-r", "r", [name for name in outputs if name != "owl"]),
    ):
        right: dict[str, list[bool]] = {"ft": [], "ensemble": []}
        for label in choices:
            path = data / folder / (str(NUMBERS[label]) if folder == "v2" else wnids[NUMBERS[label]])
            pixels = [resize_and_crop(Image.open(file), 32) for file in sorted(path.iterdir())]
            images = torch.from_numpy(np.stack(pixels))
            allowed = [outputs.index(choice) for choice in choices]
            tuned, start = (model(images).softmax(dim=1)[:, allowed] for model in models)
            for method, probabilities in {"ft": tuned, "ensemble": tuned + start}.items():
                right[method] += (probabilities.argmax(dim=1) == choices.index(label)).tolist()
        for method, hits in right.items():
            assert len(hits) == 5 * len(choices)
            assert found[method][name] == pytest.approx(100 * sum(hits) / len(hits))
    assert found["ft"] != found["ensemble"]


def test_an_interrupted_table_continues(call, sets, tmp_path, monkeypatch):
    arguments = ["--test", *sets[:3], "--methods", "ft", "lp", "wise-ft", "--seeds", "0", "--alphas", "0.5", "1"]
    measured = []
    real = suite.measure

    def counted(model, benchmark, *rest):
        if len(measured) == 4:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(benchmark.name)
        return real(model, benchmark, *rest)

    monkeypatch.setattr(suite, "measure", counted)
    code, printed, table = call(*arguments)
    assert (code, table) == (130, None)
    assert "the same command continues" in printed
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").glob("*/model.safetensors")}
    assert len(runs) == 2
    code, printed, table = call(*arguments)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    # Two of lp's, then α 0.5; α 1 is ft itself.
    assert measured[5:] == ["imagenet", "imagenet-r", "imagenet-v2", "imagenet", "imagenet-r"]
    assert printed.count("(reused)") == 7
    found = {row["method"]: row["accuracy"] for row in table["rows"]}
    assert found["wise-ft α 1"] == found["ft"]
    assert call(*arguments)[2] == table
    assert len(measured) == 10


def test_more_test_sets_cost_no_training(call, sets, data, tmp_path):
    chosen = ["--methods", "ft", "--seeds", "0"]
    before = call("--test", *sets[:2], *chosen)[2]["rows"][0]["accuracy"]
    written = (tmp_path / "table" / "ft-seed0" / "model.safetensors").stat().st_mtime_ns
    code, _, table = call(
        "--test", *sets[:2], "--test", f"imagenet-sketch:{data}/sketch", "--id", "imagenet-v2", *chosen
    )
    assert code == 0
    assert table["id"] == "imagenet-v2"
    assert table["rows"][0]["accuracy"].items() > before.items()
    assert (tmp_path / "table" / "ft-seed0" / "model.safetensors").stat().st_mtime_ns == written


def test_training_folders_that_were_renamed(call, sets, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    arguments = ["--test", *sets[:2], "--methods", "ft", "--seeds", "0", "--data.train", tmp_path / "train"]
    assert call(*arguments)[0] == 0
    folder = next((tmp_path / "train").iterdir())
    folder.rename(folder.with_name("n99999999"))
    code, printed, _ = call(*arguments, "--outside", "skip")
    assert code == 1
    assert "ft-seed0 holds a run with other settings (other data or initial weights)" in printed


def test_held_out_images_choose_the_epoch(call, sets, tmp_path):
    """Of every row but WiSE-FT, which takes the last; at a rate far too high, that isn't the one they know best."""
    arguments = ["--methods", "ft", "wise-ft", "soup", "--seeds", "0", "--alphas", "1", "--data.holdout", "12"]
    code, _, table = call("--test", *sets[:2], *arguments, "--optim.lr", "3", "--optim.epochs", "2")
    assert code == 0
    run = tmp_path / "table" / "ft-seed0"
    found = {row["method"]: row["accuracy"] for row in table["rows"]}
    assert found["ft"] == found["soup"]
    keys = {}  # of measurements, which tell the weights
    for weights in ("best", "final"):
        options = ["--device", "cpu", "--backend", "torch", "--threads", "0", "--out", str(tmp_path / weights)]
        assert evaluate(["--run", str(run), "--data", *sets[:2], "--weights", weights, *options]) == 0
        keys[weights] = set(json.loads((tmp_path / weights / "results.json").read_text())["measurements"])
    measured = json.loads((tmp_path / "table" / "results.json").read_text())["measurements"]
    last = {key for key, entry in measured.items() if entry["model"] == "wise-ft α 1"}
    assert (keys["best"], keys["final"]) == (set(measured) - last, last)
    assert not keys["best"] & keys["final"]


def test_names_are_translated_or_left_out(call, sets, data, image_folders, tmp_path, wnids):
    own = f"own=subset:{image_folders['id']}"
    chosen = ["--test", sets[1], own, "--methods", "zero-shot", "--seeds", "0"]
    code, printed, table = call(*chosen)
    assert (code, table) == (1, None)
    assert "3 of 3 classes of own" in printed
    assert "'cat', 'dog', 'owl'; --outside skip" in printed
    (tmp_path / "map.yaml").write_text("\n".join(f"{name}: {wnids[n]}" for name, n in NUMBERS.items() if name != "owl"))
    options = ["--class-map", tmp_path / "map.yaml", "--outside", "skip"]
    code, printed, table = call(*chosen, *options)
    assert code == 0
    assert table["data"][1]["images"] == 10
    assert "1 of 3 classes of own" in (tmp_path / "table" / "table.md").read_text()


@pytest.mark.parametrize("page", ["docs/evaluate.md", "docs/reproduction.md"])
def test_the_documented_command(call, data, page):
    """It runs as it is written, but for the paths, the model, and fewer methods, seeds and images."""
    command = re.search(r"maskcf table (--data\.train.*?)\n```", (ROOT / page).read_text(), re.DOTALL)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    at = words.index("--model.name")
    assert words[at : at + 4] == ["--model.name", "open_clip:ViT-B-32/openai", "--model.head", "head.safetensors"]
    del words[at : at + 4]
    at = words.index("--seeds")  # given again they would be more
    assert words[at : at + 5] == ["--seeds", "0", "1", "2", "--out"]
    del words[at : at + 4]
    places = {"imagenet": "val", "imagenet-v2": "v2", "imagenet-r": "r", "imagenet-a": "r", "imagenet-sketch": "sketch"}
    sets = words[words.index("--test") + 1 :]
    assert [text.partition(":")[0] for text in sets] == [*places, "objectnet"]
    sets = [f"{layout}:{data / place}" for layout, place in {**places, "objectnet": "objectnet"}.items()]
    short = ["--data.train", data / "train", "--data.holdout", "6", "--methods", "zero-shot", "ft", "--seeds", "0"]
    code, printed, table = call(*words[: words.index("--test") + 1], *sets, *short, "--out", data / "out")
    assert (code, table) == (0, None)
    names = ["imagenet (ID)", *list(places)[1:], "objectnet"]
    assert f"| method | {' | '.join(names)} | OOD average |" in printed
    (row,) = [row for row in json.loads((data / "out" / "table.json").read_text())["rows"] if row["method"] == "ft"]
    assert row["accuracy"]["objectnet"] == 100  # one class is left
    shutil.rmtree(data / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--test", "imagenet:{data}/val", "imagnet-v2:{data}/v2"], "did you mean 'imagenet-v2'?"),
        (["--test", "imagenet:{data}/val"], "at least one shifted are needed, got 1"),
        ([], "at least one shifted are needed, got 0: --test [NAME=][LAYOUT:]PATH…, or --data.id DIR"),
        (["--test", "imagenet:{data}/val", "{data}/v2", "--class-map", "/absent.yaml"], "no class map at"),
    ],
)
def test_mistakes(call, data, tmp_path, arguments, words):
    """Found before anything is trained."""
    code, printed, table = call(*(part.format(data=data) for part in arguments), "--methods", "ft")
    assert (code, table) == (1, None)
    assert words in printed
    assert not list((tmp_path / "table").glob("*/model.safetensors"))
