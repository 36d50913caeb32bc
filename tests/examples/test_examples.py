"""Every example runs as it is; those that train come to fit their few images."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example(path, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", [str(path)])
    monkeypatch.chdir(tmp_path)
    assert len(path.read_text().splitlines()) <= 60
    scope = runpy.run_path(str(path), run_name="__main__")
    assert not list(tmp_path.iterdir())  # nothing is left behind
    losses = [float(loss) for loss in re.findall(r": loss ([\d.]+)", capsys.readouterr().out)]
    if path.stem == "timm_heatmaps":
        assert scope["heat"].shape == (2, 1, 224, 224)
        assert (scope["heat"].amax((1, 2, 3)) > 0.9).all()
    elif path.stem == "ops_alone":
        mask, images = scope["mask"], scope["images"]
        score = scope["cam"] / scope["cam"].amax(1, keepdim=True)
        assert torch.equal(mask, score > 0.3)
        pixels = mask.view(4, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3)
        assert torch.equal(scope["refilled"], torch.where(pixels, images[scope["donors"]], images))
    else:
        assert losses[-1] < losses[0] / 2
