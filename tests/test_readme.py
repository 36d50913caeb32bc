"""The README's snippets run as they are written, apart from the download of weights."""

import re
import shlex
from pathlib import Path

import pytest
import torch

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
    """The head, the command, and the loop, one after the other; in place of a download, random weights."""
    import open_clip

    from maskcf_fast.train import main
    from maskcf_fast.zeroshot import main as zeroshot

    real = open_clip.create_model

    def create_model(name, tag=None, **options):
        assert (name, tag) == ("ViT-B-32", "openai")
        torch.manual_seed(0)
        return real(name, None, **options)

    monkeypatch.setattr(open_clip, "create_model", create_model)

    monkeypatch.chdir(tmp_path)
    for seed, (name, count) in enumerate({"train": 4, "val": 1, "sketch": 1}.items()):
        write_images(tmp_path / "data" / name, count, seed)
    command = shlex.split(block("head"))
    assert command[:3] == ["python", "-m", "maskcf_fast.zeroshot"]
    assert zeroshot(command[3:]) == 0

    command = shlex.split(block("train").replace("\\\n", ""))
    assert command[:3] == ["python", "-m", "maskcf_fast.train"]
    assert main([*command[3:], "--optim.epochs", "1", "--optim.batch-size", "6"]) == 0
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()
    assert main(["--resume", "runs/mine"]) == 0

    scope: dict = {}
    exec(block("step"), scope)
    assert scope["student"].backbone.patch_weight.grad.norm() > 0
