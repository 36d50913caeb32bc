"""A small data set and model that the tests of the trainer and the commands share."""

from __future__ import annotations

import os

# Before any import reads it: tests must neither use nor fill the user's cache.
os.environ.setdefault("MASKCF_CACHE", os.path.join(os.environ.get("TMPDIR", "/tmp"), f"maskcf-tests-{os.getpid()}"))

import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskcf_fast.core.tensors import save_tensors
from maskcf_fast.models import CosineClassifier, ImageClassifier, VisionTransformer
from maskcf_fast.training.settings import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

CLASSES = ("cat", "dog", "owl")


def _write_images(root: Path, per_class: int, seed: int) -> Path:
    """Noise with a tint that tells the class: learnable within a few steps."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 160, (40, 36, 3), dtype=np.uint8)
            pixels[..., label] += 90
            Image.fromarray(pixels).save(root / name / f"{i:03d}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def write_images():
    """``write_images(root, per_class, seed)``: a folder of class folders."""
    return _write_images


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory) -> dict[str, Path]:
    """Folders "train" (60 images of 3 classes), "id" and "ood" (15 each)."""
    root = tmp_path_factory.mktemp("images")
    return {
        name: _write_images(root / name, per_class, seed)
        for seed, (name, per_class) in enumerate({"train": 20, "id": 5, "ood": 5}.items())
    }


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A tiny classifier with random weights, as a file."""
    torch.manual_seed(0)
    model = ImageClassifier(VisionTransformer("tiny"), CosineClassifier(64, len(CLASSES)))
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_tensors(path, model.state_dict())
    return path


@pytest.fixture
def config(image_folders, weights, tmp_path) -> TrainConfig:
    """Two epochs of five steps."""
    return TrainConfig(
        model=ModelConfig("tiny", weights),
        data=DataConfig(
            image_folders["train"], image_folders["id"], (image_folders["ood"],), backend="torch", threads=0
        ),
        method=MethodConfig(weight=1.0),
        optim=OptimConfig(epochs=2, batch_size=12, lr=1e-3),
        out=tmp_path / "run",
        device="cpu",
    )


@pytest.fixture
def change(config):
    """``change(method={"name": "ft"}, seed=1)``: the config with some fields replaced."""

    def changed(**fields):
        nested = {
            name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in fields.items()
        }
        return replace(config, **nested)

    return changed


@pytest.fixture
def port():
    """A free one, for processes to meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
