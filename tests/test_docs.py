"""The README and the pages of docs/: their commands and snippets run, their links lead somewhere.

Every command is read by its own parser. A shell block after ``<!-- test: run -->`` also runs, in one folder of tiny
data, with random weights in place of downloads, and so does every Python block. Blocks after ``<!-- ci: … -->`` are run
by ``.ci/run``.
"""

from __future__ import annotations

import argparse
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tyro

from maskcf_fast import __main__ as maskcf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
TOOLS = {
    ".ci/audit",
    ".ci/gpu",
    ".ci/run",
    "apt-get",
    "git",
    "lint-imports",
    "mkdocs",
    "mypy",
    "pip",
    "pre-commit",
    "pytest",
    "ruff",
    "twine",
}
SHORT = {"train": ["--optim.epochs", "1", "--optim.batch-size", "6"]}  # what an executed command gets in addition
BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+: \w+) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Mark and code of each block of a kind."""
    for match in BLOCK.finditer(page.read_text()):
        if match["kind"] == kind:
            yield match["mark"] or "", match["code"]


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command of a shell block."""
    for line in re.split(r"\n| && ", code.replace("\\\n", " ")):
        if words := shlex.split(line, comments=True):
            yield words


def package_command(words: list[str]) -> tuple[str, list[str]] | None:
    """Name and arguments, however one of the package's commands is started; None for other commands."""
    if words[0] == "maskcf":
        return words[1], words[2:]
    for at, word in enumerate(words):
        if word.startswith("maskcf_fast.") and words[0] in ("python", "torchrun"):
            return word.removeprefix("maskcf_fast."), words[at + 1 :]
    return None


class Parsed(Exception):
    pass


@pytest.fixture
def only_parse(monkeypatch):
    """Commands stop after they have read their arguments."""

    def stopping(read):
        def parse(*arguments, **options):
            read(*arguments, **options)
            raise Parsed

        return parse

    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))


def check(words: list[str]) -> None:
    """Raise unless this is a command that its own parser accepts, or another tool's."""
    if found := package_command(words):
        name, arguments = found
        with pytest.raises((Parsed, SystemExit)) as end:
            maskcf.main([name, *arguments])
        assert end.type is Parsed or (end.value.code, arguments) == (0, ["--help"]), words
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        main = import_module(words[2]).main
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words[2:])
            with pytest.raises(Parsed):
                main()
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for given in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert set(given.split(",")) <= set(extras)
    elif words[0].startswith("MASKCF_"):
        assert words[0].partition("=")[0] in (ROOT / "docs" / "environment.md").read_text()
        check(words[1:])
    else:
        known = words[0] in TOOLS or words[:3] == ["python3", "-m", "venv"] or words == [".", ".venv/bin/activate"]
        assert known, f"unknown command: {' '.join(words)}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.stem)
def test_every_command_is_one(page, only_parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")  # what --resume reads before anything else
    (tmp_path / "RUN").symlink_to(run)
    inline = re.findall(r"`((?:maskcf |python -m benchmarks\.)[^`…]*)`", BLOCK.sub("", page.read_text()))
    for code in [*inline, *(code for _, code in blocks(page, "bash"))]:
        for words in commands(code):
            if words not in (["maskcf", "--help"], ["maskcf", "--version"]):
                check(words)


@pytest.mark.parametrize("name", ["train", "models"])
def test_every_option_is_one(name, only_parse):
    """Those that a page names by themselves, as in a table."""
    options = re.findall(r"`(--\w[^`]*)`", (ROOT / "docs" / f"{name}.md").read_text())
    options = [option for option in options if not re.match(r"--(to|config|classes|model\.name)\b", option)]
    assert options
    for option in options:
        check(["maskcf", "train", "--data.train", "x", *shlex.split(option)])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, write_images):
    """A folder with images, and the README's head and run; weights are random instead of downloaded."""
    import open_clip
    import timm

    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for library in (open_clip, timm):
            real = library.create_model

            def create_model(name, *arguments, real=real, **options):
                torch.manual_seed(0)
                options.pop("pretrained", None)
                return real(name, **options)

            patch.setattr(library, "create_model", create_model)
        for seed, (name, count) in enumerate({"train": 4, "val": 1, "sketch": 1}.items()):
            write_images(folder / "data" / name, count, seed)
        execute(PAGES[0])
        yield folder


def execute(page: Path) -> None:
    """Run the page's marked shell blocks in the present folder."""
    for mark, code in blocks(page, "bash"):
        if mark == "test: run":
            for words in commands(code):
                name, arguments = package_command(words)
                more = SHORT.get(name, []) if "--resume" not in arguments else []
                assert maskcf.main([name, *arguments, *more]) == 0, " ".join(words)


def test_fine_tuning_as_in_the_readme(workshop):
    assert {"model.safetensors", "config.yaml", "metrics.jsonl"} <= {p.name for p in (workshop / "runs/mine").iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, workshop):
    if page.stem != "README":
        execute(page)
    scope: dict = {}
    for _, code in blocks(page, "python"):
        exec(code, scope)
    expected = {
        "README": lambda: scope["refilled"].shape == (8, 3, 224, 224) and scope["cam"].shape == (8, 196),
        "train": lambda: scope["student"].backbone.patch_weight.grad.norm() > 0,
        "ops": lambda: scope["mask"].any() and (scope["cam"] > 0).any(),
        "explain": lambda: (scope["cam"] > 0).any() and (workshop / "maps").is_dir() and (workshop / "page").is_dir(),
        "evaluate": lambda: (workshop / "runs/mine/evaluation/table.md").is_file(),
        "models": lambda: any((workshop / "exports/mine").iterdir()),
    }
    assert expected.get(page.stem, lambda: not scope)()


def anchors(page: Path) -> set[str]:
    """The headings as GitHub and the site name them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 150


def test_every_environment_variable_is_documented():
    sources = [path for folder in ("maskcf_fast", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"environ\b[^\n]{0,9}\"(MASKCF_\w+)", path.read_text())}
    assert "MASKCF_DEBUG" in read
    assert not read - set(re.findall(r"`(MASKCF_\w+)`", (ROOT / "docs" / "environment.md").read_text()))
