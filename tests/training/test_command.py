"""The command line: settings, presets, and what a user sees when something is wrong."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import maskcf_fast.configs
from maskcf_fast.core.errors import UserError
from maskcf_fast.experiments.table import FURTHER
from maskcf_fast.methods import MaskStrategy
from maskcf_fast.methods.registry import METHODS
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.train import main
from maskcf_fast.training.build import build_method, build_optimizer
from maskcf_fast.training.settings import find_yaml, parse, to_yaml, yaml_arguments

CUTS = {  # the paper's table: rates of random strategies, thresholds of the others
    "random-none": 0.75, "random-single": 0.5, "random-multi": 0.5,
    "object-none": 0.3, "object-single": 0.3, "object-multi": 0.6,
    "context-none": 0.6, "context-single": 0.5, "context-multi": 0.3,
}  # fmt: skip
PRESETS = sorted(path.stem for path in Path(maskcf_fast.configs.__path__[0]).glob("*.yaml"))


def arguments(config, **changes):
    """A command line for the config, through its YAML file."""
    path = config.out.parent / "settings.yaml"
    path.write_text(to_yaml(replace(config, **changes)))
    return ["--config", str(path)]


@pytest.mark.parametrize("preset", sorted({*PRESETS} - {*FURTHER}))
def test_presets_are_the_papers_settings(preset):
    """Those of the run that is built from them: what a preset leaves out, the method knows."""
    config = parse(["--config", preset])
    optim = config.optim
    assert (optim.epochs, optim.batch_size, optim.lr, optim.clip, optim.warmup) == (10, 512, 3e-5, 1.0, 0.02)
    assert optim.cycle_beta1
    assert (config.data.holdout, config.model.arch) == ("paper", "ViT-B/32")
    student = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, 3))
    method = build_method(config.method, student)
    assert config.method.name == (preset if preset not in CUTS else "counterfactual")
    assert method.weight == {"ft": 0, "lp": 0, "l2-sp": 0.1}.get(preset, 30)
    assert getattr(method, "temperature", None) == (10 if preset in ("kd", "cf-kd") else None)
    optimizer, _ = build_optimizer(optim, method, 10)
    assert optimizer.defaults["weight_decay"] == (0 if preset in ("lp", "l2-sp") else 0.1)
    section = yaml.safe_load(find_yaml(preset).read_text())
    assert {*section, *section["method"], *section["data"]} <= {"method", "data", "name", "strategy", "holdout"}


@pytest.mark.parametrize("preset", [name for name in PRESETS if METHODS[parse(["--config", name]).method.name].masks])
def test_no_preset_carries_the_cut_of_another_strategy(preset):
    for strategy, cut in CUTS.items():
        made = parse(["--config", preset, "--method.strategy", strategy]).method.mask_strategy()
        assert (made.name, made.rate if made.region == "random" else made.threshold) == (strategy, cut)
        assert made.top_k is None
    assert parse(["--config", preset, "--method.strategy=object-none", "--method.top_k=3"]).method.mask_strategy().top_k


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([], MaskStrategy("object", "single", threshold=0.35)),
        (["--method.strategy", "object-multi"], MaskStrategy("object", "multi", threshold=0.6)),
        (["--method.strategy=random-none"], MaskStrategy("random", "none", rate=0.75)),
        (["--method.top-k", "7"], MaskStrategy("object", "single", top_k=7)),
        (["--method.threshold", "0.1"], MaskStrategy("object", "single", threshold=0.1)),
        (["--method.strategy", "context-none", "--method.top_k", "7"], MaskStrategy("context", "none", top_k=7)),
    ],
)
def test_a_cut_goes_with_the_strategy_that_it_was_set_for(own, expected, config):
    """Also one that a file, such as a run's config.yaml, sets for the strategy that it names."""
    line = arguments(config, method=replace(config.method, threshold=0.35))
    assert parse([*line, *own]).method.mask_strategy() == expected


def test_yaml_round_trip_and_later_arguments_win(config, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]) == config
    changed = parse(["--config", str(path), "--optim.lr=0.5", "--data.ood", "/a", "/b", "--data.verify", "False"])
    assert changed.optim.lr == 0.5
    assert changed.data.ood == (Path("/a"), Path("/b"))
    assert changed.data.verify is False
    assert changed.optim.epochs == config.optim.epochs


def test_a_run_from_the_command_line_and_its_resumption(config, capsys):
    assert main(arguments(config)) == 0
    out = capsys.readouterr().out
    assert "id: " in out
    assert str(config.out) in out
    names = {p.name for p in config.out.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "best.safetensors",
        "model.safetensors",
    }  # fmt: skip
    assert yaml.safe_load((config.out / "config.yaml").read_text())["method"]["weight"] == 1.0
    assert main(["--resume", str(config.out)]) == 0
    assert main(["--resume", str(config.out), "--optim.lr", "1.0"]) == 1
    assert "--optim.lr" in capsys.readouterr().err


def test_divergence_is_reported(config, capsys):
    assert main(arguments(config, optim=replace(config.optim, lr=1e30))) == 1
    error = capsys.readouterr().err
    assert re.search(r"NaN or infinite at step \d+ of 10; the last good checkpoint is .*step-0", error)
    assert "--optim.lr" in error


def test_bad_image_is_named_or_skipped(config, image_folders, tmp_path, capsys):
    root = shutil.copytree(image_folders["train"], tmp_path / "broken")
    broken = root / "dog" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    data = replace(config.data, train=root)
    assert main(arguments(config, data=data)) == 1
    error = capsys.readouterr().err
    assert "dog/003.jpg" in error
    assert "--data.on-bad-image skip" in error
    assert main(arguments(config, data=replace(data, on_bad_image="skip"))) == 0
    out = capsys.readouterr().out
    assert "skipped 1 bad file" in out
    assert "dog/003.jpg" in out


def test_folders_that_do_not_fit(config, image_folders, tmp_path, capsys):
    def message(**data):
        assert main(arguments(config, data=replace(config.data, **data))) == 1
        return capsys.readouterr().err

    assert "absent" in message(train=tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    assert "bare" in message(train=tmp_path / "bare")
    other = tmp_path / "other"
    shutil.copytree(image_folders["id"], other)
    (other / "owl").rename(other / "owls")
    error = message(id=other)
    assert "owl" in error
    assert "owls" in error
    (other / "owls").rename(other / "owl")
    shutil.rmtree(other / "owl")
    (other / "owl").mkdir()
    assert "owl" in message(ood=(other,))


DATA = "--data.train {train}"
TINY = f"{DATA} --model.arch tiny"
MISTAKES = [
    ("--config object-singel", "did you mean 'object-single'"),
    ("--config object-single", "--data.train DIR is missing"),
    (f"{DATA} --model.arch tinny --model.weights random", "did you mean 'tiny'"),
    (DATA, "--model.weights"),
    (f"{DATA} --model.weights /absent.safetensors", "/absent.safetensors"),
    (f"{DATA} --model.weights {{weights}} --model.arch ViT-B/32", "another architecture"),
    (f"{TINY} --model.weights {{weights}} --model.head {{head}}", "is [7, 64], but there are 3 class folders"),
    (f"{DATA} --optim.lr -1", "optim.lr must be positive and finite, got -1"),
    (f"{DATA} --optim.weight-decay nan", "weight_decay must be finite, got nan"),
    (f"{DATA} --method.weight inf", "method.weight must be finite, got inf"),
    (f"{DATA} --checkpoint-minutes nan", "checkpoint_minutes must be finite, got nan"),
    (f"{DATA} --config kd --method.temperature inf", "method.temperature must be positive"),
    (f"{DATA} --seed {2**31}", f"seed must be at most {2**31 - 1}, got {2**31}"),
    (f"{DATA} --optim.epochs {10**13}", "more than the 16,777,216 that AdamW counts: lower"),
    (f"{TINY} --model.weights {{weights}} --optim.batch-size 6 --optim.epochs {2**24}", "raise --optim.batch-size"),
    ("--resume /absent", "/absent is no run to resume, it has no config.yaml: give the folder that a run's --out"),
    (f"{DATA} --config {{resuming}}", "is for the command line: --resume /absent (or auto)"),
    (f"{DATA} --model.image-size 224x384", "images are square, as the models' grids"),
    ("--resume /absent --resume=/other", "--resume is given 2 times"),
    ("--config ft --config lp", "--config is given 2 times"),
    ("--resume /absent --config ft", "no --config, no --out"),
    (f"{TINY} --method.top-k 17", "exceeds the 16 patches of tiny"),
    (f"{DATA} --method.top-k -1", "top_k must not be negative, got -1"),
    (f"{DATA} --method.start-layer 99", "start_layer must lie in [-12, 11], got 99"),
    (f"{DATA} --device cuda", "no GPU"),
    (f"{TINY} --model.weights {{weights}} --optim.batch-size 99", "lower the batch size"),
    (f"{TINY} --model.weights random --data.holdout 60", "60"),
    (f"{TINY} --model.weights random --method.strategy obj", "unknown strategy 'obj'"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case asks for a GPU that is not there")
def test_bad_settings(line, words, image_folders, weights, tmp_path, capsys):
    resuming, head = tmp_path / "resuming.yaml", tmp_path / "head.safetensors"
    resuming.write_text("resume: /absent")
    save_file({"weight": torch.zeros(7, 64)}, head)
    line = line.format(train=image_folders["train"], weights=weights, resuming=resuming, head=head).split()
    if "--resume" not in line:
        line += ["--out", str(tmp_path / "run")]
    assert main(line) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "optim:\n  lr: 1\n  epochs: 2\n  lr: 1", "{seed: 1, 'seed': 2}"])
def test_a_setting_that_a_file_gives_twice(tmp_path, text):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(UserError, match=r"twice.yaml says (seed|lr) twice: YAML would take the last alone"):
        parse(["--config", str(tmp_path / "twice.yaml")])


def test_words_of_yaml_are_what_they_look_like(tmp_path):
    path = tmp_path / "words.yaml"
    path.write_text("out: 001\nseed: 007\noptim: {lr: 1e-5}\ndata: {train: no, verify: no, ood: [on, 1.50]}\n")
    read = parse(["--config", str(path)])
    assert (read.out, read.seed, read.optim.lr) == (Path("001"), 7, 1e-5)
    assert (read.data.train, read.data.verify, read.data.ood) == (Path("no"), False, (Path("on"), Path("1.50")))


def test_unknown_setting_names_the_nearest(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--optim.lrr", "1"])
    assert exit_.value.code != 0
    assert "--optim.lr" in "".join(capsys.readouterr())
    path = tmp_path / "bad.yaml"
    path.write_text("optim:\n  lrr: 1\n")
    with pytest.raises(ValueError, match=r"bad.yaml: unknown setting 'optim.lrr' .*did you mean 'optim.lr'\?"):
        yaml_arguments(path)
    path.write_text("optim: 3\n")
    with pytest.raises(ValueError, match="optim must hold settings by name, got '3'"):
        yaml_arguments(path)
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match="is neither YAML nor JSON"):
        yaml_arguments(path)
    with pytest.raises(ValueError, match="unknown preset or file"):
        find_yaml("zzz")
