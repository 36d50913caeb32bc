"""The README's snippets run as they are written, apart from the download of weights."""

import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def block(name: str) -> str:
    """The code block that follows the comment ``<!-- test: name -->``."""
    match = re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL)
    assert match, f"README.md has no block {name!r}"
    return match[1]


@pytest.mark.parametrize("name", ["ops", "relevance"])
def test_op_snippets(name):
    scope: dict = {}
    exec(block(name), scope)
    if name == "ops":
        assert scope["refilled"].shape == (8, 3, 224, 224)
        assert scope["mask"].any()
    else:
        assert scope["cam"].shape == (2, 196)
        assert (scope["cam"] > 0).any()


def test_fine_tuning_ones_own_images(tmp_path, monkeypatch, write_images):
    """Weights and head from open_clip, the command, and the loop, one after the other."""
    from maskcf_fast.train import main

    monkeypatch.chdir(tmp_path)
    for seed, (name, count) in enumerate({"train": 4, "val": 1, "sketch": 1}.items()):
        write_images(tmp_path / "data" / name, count, seed)
    head = block("head")
    assert 'pretrained="openai"' in head
    exec(head.replace('pretrained="openai"', "pretrained=None"), {})

    command = shlex.split(block("train").replace("\\\n", ""))
    assert command[:3] == ["python", "-m", "maskcf_fast.train"]
    assert main([*command[3:], "--optim.epochs", "1", "--optim.batch-size", "6"]) == 0
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()
    assert main(["--resume", "runs/mine"]) == 0

    scope: dict = {}
    exec(block("step"), scope)
    assert scope["student"].backbone.patch_weight.grad.norm() > 0
