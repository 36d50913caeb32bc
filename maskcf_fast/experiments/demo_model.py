"""What the demo starts from: its data, and a model pre-trained where the cue says nothing; both kept in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from ..core.files import cache_dir
from ..core.processes import Processes
from ..training.settings import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig, to_yaml
from .comparison import train
from .demo_data import DemoData, DemoSpec, build_demo_data

PRETRAINING = OptimConfig(epochs=4, batch_size=64, lr=2e-3, weight_decay=0.05, warmup=0.15)
FINE_TUNING = OptimConfig(epochs=4, batch_size=64, lr=1e-3, warmup=0.1)


def demo_start(quick: bool, processes: Processes) -> tuple[TrainConfig, DemoData]:
    """The settings to fine-tune with, from the pre-trained model on, and the data.

    Args:
        quick: Few images and one epoch of everything.
        processes: What pre-trains.
    """
    spec = DemoSpec(counts=(600, 300, 300, 200, 200)) if quick else DemoSpec()
    root = cache_dir("demo") / ("quick" if quick else "data")
    print(f"Data: real digits before real photographs, whose tint tells the class ({root})")
    data = build_demo_data(root, spec=spec, progress=True)
    print(f"  checksum {data.checksum[:16]}")
    pretraining, fine_tuning = (
        dataclasses.replace(optim, epochs=1) if quick else optim for optim in (PRETRAINING, FINE_TUNING)
    )
    config = TrainConfig(
        ModelConfig("tiny", Path("random"), image_size=spec.image_size),
        DataConfig(data.root / "pretrain"),  # without test sets: what is trained is measured once, by the table
        MethodConfig("ft"),
        pretraining,
        device="cpu",
        eval_every=0,
    )
    key = hashlib.sha256((to_yaml(config) + data.checksum).encode()).hexdigest()[:16]
    folder = cache_dir("demo", "pretrained", key)
    weights = folder / "model.safetensors"
    if weights.exists():
        print(f"Pre-trained model: reused ({weights})")
    else:
        print(f"Pre-trained model: trained once, on white digits whose tint says nothing ({weights})")
        train(dataclasses.replace(config, out=folder), processes, "pre-training")
    start = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, weights=weights),
        data=DataConfig(data.root / "train"),
        method=MethodConfig(),
        optim=fine_tuning,
    )
    return start, data
