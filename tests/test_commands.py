"""``maskcf COMMAND`` and ``python -m maskcf_fast.COMMAND``."""

import dataclasses
from pathlib import Path

import pytest

import maskcf_fast
from maskcf_fast.__main__ import MODULES, main
from maskcf_fast.core.command import read_settings


def test_help_says_what_every_command_is_for(capsys):
    assert main(["--help"]) == main([]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert dict(lines).keys() == MODULES.keys()
    assert all(len(what) > 20 for _, what in lines)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", ("--data.train", "embedded demo", "--method.strategy", "Peak learning rate", "--resume")),
        ("train", ("cf-kd: Knowledge distillation on counterfactual images.", "context-multi")),
        ("evaluate", ("--run", "--data", "[NAME=][LAYOUT:]PATH", "--wise-ft", "Measure fine-tuned models")),
    ],
)
def test_help_of_a_command_is_readable(name, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert not end.value.code
    said = capsys.readouterr().out
    assert [text for text in words if text not in said] == []


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskcf_fast {maskcf_fast.__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean 'train'?"), ("qqqq", "there are train, evaluate,")])
def test_an_unknown_command(name, hint, capsys):
    assert main([name]) == 2
    said = capsys.readouterr().err
    assert f"unknown command '{name}'" in said
    assert hint in said


@pytest.mark.parametrize("name", MODULES)
def test_an_unknown_option_is_refused_with_the_usage(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--foo"])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "--foo" in said.err + said.out
    assert f"maskcf {name}" in said.err + said.out or name == "train"


@dataclasses.dataclass(frozen=True)
class Inner:
    many: tuple[int, ...] = ()
    folder: Path | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    inner: Inner = dataclasses.field(default_factory=Inner)
    paths: tuple[Path, ...] = ()
    one: str = ""


@pytest.mark.parametrize(
    ("before", "arguments", "expected"),
    [
        ([], ["--paths", "a", "--one", "x", "--paths", "b", "c"], Settings(paths=tuple(map(Path, "abc")), one="x")),
        ([], ["--inner.many=1", "--inner.many", "-2", "3"], Settings(Inner((1, -2, 3)))),
        (["--paths", "a"], ["--paths", "b"], Settings(paths=(Path("b"),))),  # takes a file's place
        (
            [],
            ["--paths", "a", "~/b", "--inner.folder=~/c"],
            Settings(Inner((), Path("/h/c")), (Path("a"), Path("/h/b"))),
        ),
        ([], ["--one", "~/x"], Settings(one="~/x")),  # no path
    ],
)
def test_lists_add_up_and_home_is_expanded(monkeypatch, before, arguments, expected):
    monkeypatch.setenv("HOME", "/h")
    assert read_settings(Settings, arguments, "some", before) == expected


@pytest.mark.parametrize("out", ["/proc/absent", "{file}", "{file}/below", "{folder}/" + 300 * "n"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", "--data.train {folder} --model.weights random --model.arch tiny"),
        ("demo", ""),
        ("build", ""),
        ("explain", "--model timm:vit_tiny_patch16_224 --images {folder}"),
        ("zeroshot", "--model open_clip:ViT-B-32/openai --classes {file}"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_at_once(name, arguments, out, tmp_path, capsys):
    """Before data, weights or a compiler are looked for, of which there is none here."""
    (tmp_path / "file").write_text("cat\ndog")
    arguments, out = (text.format(file=tmp_path / "file", folder=tmp_path) for text in (arguments, out))
    file = f"{out}/head" if name == "zeroshot" else out
    assert main([name, *arguments.split(), "--out", file]) == 1
    said = capsys.readouterr().err
    assert f"cannot write to {out} (" in said
    assert "choose another --out" in said


@pytest.mark.parametrize("name", ["quantum", "meta", "mps", "cuda:99999999999999999999", "cuda:7", ""])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", "--data.train {folder} --model.weights random --model.arch tiny"),
        ("explain", "--model torchvision:vit_b_16 --images {folder}"),
        ("zeroshot", "--model open_clip:ViT-B-32/openai --classes {folder}/file"),
    ],
)
def test_a_device_that_is_none_is_named_by_every_command(command, arguments, name, tmp_path, capsys):
    (tmp_path / "file").write_text("cat\ndog")
    (tmp_path / "a.png").touch()
    given = arguments.format(folder=tmp_path).split()
    assert main([command, *given, "--out", str(tmp_path / "out"), "--device", name]) == 1
    said = capsys.readouterr().err
    assert "device must be cpu, cuda or auto" in said or f"device={name!r}, but torch sees" in said


@pytest.mark.parametrize("option", ["--data.train", "--data.ood", "--out", "--model.weights"])
def test_a_path_of_nothing_is_not_this_folder(option, capsys):
    assert main(["train", option, "", "--seed", "1"]) == 1
    assert f'{option} "" names no path: is a variable of the shell not set?' in capsys.readouterr().err
