"""From settings to the objects of a run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data import Loader, LoaderConfig, Manifest, build_loader, scan_images
from ..distill import (
    CounterfactualDistiller,
    FeatureDistillation,
    FineTuning,
    KnowledgeDistillation,
    Method,
)
from ..models import CosineClassifier, ImageClassifier, VisionTransformer, load_backbone
from .config import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig
from .distributed import Processes


def build_model(config: ModelConfig, num_classes: int, seed: int) -> ImageClassifier:
    """The pre-trained classifier that fine-tuning starts from, on the CPU.

    Raises:
        ValueError: No weights given, or weights or a head that do not fit.
        FileNotFoundError: A file is missing.
    """
    if config.weights is None:
        raise ValueError(
            "fine-tuning starts from a pre-trained model: pass --model.weights FILE.safetensors "
            '("random" starts from scratch)'
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = VisionTransformer(config.arch)
        head = CosineClassifier(backbone.config.feature_dim, num_classes)
    if str(config.weights) != "random":
        load_backbone(backbone, config.weights)
    state = _head_state(config)
    if state is not None:
        weight, bias = state
        if weight.shape != head.weight.shape:
            raise ValueError(
                f"the head in {config.head or config.weights} is {list(weight.shape)}, but there are "
                f"{num_classes} class folders and features of size {backbone.config.feature_dim}"
            )
        if bias is not None and bias.shape != head.bias.shape:
            raise ValueError(
                f"the head's bias in {config.head or config.weights} is {list(bias.shape)}, not [{num_classes}]"
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"the head in {config.head or config.weights} is {weight.dtype}, it must be of a float dtype"
            )
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(torch.zeros_like(head.bias) if bias is None else bias)
    model = ImageClassifier(backbone, head)
    if bad := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"the weights in {config.weights} hold NaN or infinity, first in {bad[0]}: get them again")
    return model


def _head_state(config: ModelConfig) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the head, from its own file or from that of the whole classifier."""
    path, prefix = (config.head, "") if config.head is not None else (config.weights, "head.")
    assert path is not None
    if str(path) == "random":
        return None
    if not path.is_file():
        raise FileNotFoundError(f"no head at {path}")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error})") from error
    if f"{prefix}weight" in state:
        return state[f"{prefix}weight"], state.get(f"{prefix}bias")
    if config.head is not None:
        raise ValueError(f'{path} must hold "weight" [classes, D], it holds {", ".join(sorted(state)[:4])}')
    return None


def build_method(config: MethodConfig, student: ImageClassifier) -> Method:
    """The method, with a frozen copy of the student as it is now for its teacher."""
    if config.name in ("ft", "lp"):
        return FineTuning(student, probe=config.name == "lp")
    if config.name == "kd":
        return KnowledgeDistillation(student, copy.deepcopy(student), config.weight, config.temperature)
    teacher = copy.deepcopy(student.backbone)
    if config.name == "fd":
        return FeatureDistillation(student, teacher, config.weight)
    return CounterfactualDistiller(
        student,
        teacher,
        config.mask_strategy(),
        config.weight,
        cam=config.cam,
        cam_target=config.cam_target,
        start_layer=config.start_layer,
    )


def build_optimizer(
    config: OptimConfig, parameters: Iterable[nn.Parameter], total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW on what is to be trained, and its one-cycle schedule."""
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.lr,
        total_steps=total_steps,
        pct_start=config.warmup,
        cycle_momentum=config.cycle_beta1,
    )
    return optimizer, schedule


def scan(config: DataConfig, processes: Processes) -> tuple[Manifest, dict[str, Manifest]]:
    """The training images, and every test set by its name ("holdout", "id", or its folder's).

    The main process looks first and remembers what it found; the others read that.
    """
    if not processes.main:
        processes.barrier()
    options: dict[str, Any] = {"on_bad_image": config.on_bad_image, "verify": config.verify}
    assert config.train is not None
    train = scan_images(config.train, progress=processes.main, **options)
    tests = {}
    folders = {"id": config.id} if config.id is not None else {}
    for folder in config.ood:
        folders[_unused_name(folder, folders)] = folder
    for name, folder in folders.items():
        assert folder is not None
        tests[name] = scan_images(folder, progress=processes.main, **options)
        train.require_same_classes(tests[name])
    if processes.main:
        processes.barrier()
    if config.holdout:
        try:
            train, held_out = train.holdout(config.holdout, seed=0)
        except ValueError as error:
            raise ValueError(f"{error}: lower --data.holdout (0 holds out none)") from error
        tests = {"holdout": held_out, **tests}
    return train, tests


def _unused_name(folder: Path, taken: Iterable[str]) -> str:
    if folder.suffix == ".tar":  # a pattern, such as ood/{000..009}.tar
        folder = folder.parent
    name = folder.resolve().name
    if name in (*taken, "id", "holdout"):
        name = "/".join(folder.resolve().parts[-2:])
    if name in taken:
        raise ValueError(f"two test sets are called {name}: {folder}")
    return name


def build_loaders(
    config: TrainConfig, train: Manifest, tests: dict[str, Manifest], image_size: int, processes: Processes
) -> tuple[Loader, dict[str, Loader]]:
    """The loaders of micro-batches for training, and of the test sets.

    Raises:
        ValueError: The batch size does not divide into processes × micro-batches.
    """
    parts = processes.world_size * config.optim.accumulate
    if config.optim.batch_size % parts:
        raise ValueError(
            f"optim.batch_size={config.optim.batch_size} does not divide into {processes.world_size} process(es) × "
            f"accumulate={config.optim.accumulate}"
        )
    method = config.method
    refills = method.name == "counterfactual" and method.mask_strategy().fill != "none"
    if refills and config.optim.batch_size == parts:
        raise ValueError(
            f"{method.strategy} needs a micro-batch of at least 2 images, got 1: no other image to draw from; "
            "raise --optim.batch-size"
        )
    common: dict[str, Any] = {
        "batch_size": config.optim.batch_size // parts,
        "image_size": image_size,
        "seed": config.seed,
        "rank": processes.rank,
        "world_size": processes.world_size,
        "threads": config.data.threads,
        "device": str(processes.device),
        "cache": config.data.cache,
    }
    train_config = LoaderConfig(train=True, augment=config.data.augment, **common)
    test_config = LoaderConfig(train=False, **common)
    loader = build_loader(train, train_config, config.data.backend)
    return loader, {name: build_loader(m, test_config, config.data.backend) for name, m in tests.items()}
