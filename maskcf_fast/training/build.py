"""From settings to the objects of a run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch

from ..core.errors import UserError
from ..core.files import composed
from ..core.processes import Processes
from ..core.tensors import fingerprint
from ..data import Loader, LoaderConfig, Manifest, build_loader, scan_images
from ..evaluation.benchmark import Benchmark
from ..explain.backbone import COST, LibraryBackbone
from ..methods import METHODS, Method, registry
from ..models import (
    HEADS,
    Backbone,
    CosineClassifier,
    ImageClassifier,
    LinearClassifier,
    VisionTransformer,
    VisionTransformerConfig,
    load_backbone,
    load_source,
    preset,
)
from ..models.libraries import Unsupported
from ..models.naming import State
from ..models.weights import architecture_metadata, read_architecture, read_class_names, read_metadata, read_state
from .parts import parameter_groups
from .settings import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig

UNMODIFIED = "unmodified"  # what a file with an unmodified model's weights calls the model by
OF_LIBRARY = "backbone.module."
OURS = re.compile(r"(.+\.)?backbone\.patch_weight")  # in a file of the compact vision transformer
PAPER_HOLDOUT = 10_240  # images of ImageNet, 0.8 % of it


def build_model(
    config: ModelConfig, num_classes: int, seed: int, classes: Sequence[str] | None = None
) -> ImageClassifier:
    """The pre-trained classifier that fine-tuning starts from, on the CPU.

    Args:
        config: The model's settings.
        num_classes: Outputs of the head.
        seed: Of random weights.
        classes: Names of the class folders; a head that says which classes it stands for must have the same.

    Raises:
        ValueError: No weights given, or weights or a head that do not fit.
        FileNotFoundError: A file is missing.
        ImportError: The library that ``config.name`` names is not installed.
    """
    source = config.weights or config.name
    if source is None:
        raise UserError(
            "fine-tuning starts from a pre-trained model: pass --model.name LIBRARY:MODEL, or --model.weights "
            'FILE.safetensors ("random" starts from scratch)'
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _backbone(config)
        head = HEADS[config.head_kind](backbone.config.feature_dim, num_classes)
    _load_head(config, head, classes)
    model = ImageClassifier(backbone, head)
    if bad := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise UserError(f"the weights in {source} hold NaN or infinity, first in {bad[0]}: get them again")
    return model


def _backbone(config: ModelConfig) -> Backbone:
    """The model, with its weights: ours, or its library's own where that is asked for or no other is possible."""
    if config.weights is not None and (name := read_metadata(config.weights).get(UNMODIFIED)):
        whole = read_state(config.weights).items()
        own = {key.removeprefix(OF_LIBRARY): tensor for key, tensor in whole if key.startswith(OF_LIBRARY)}
        return LibraryBackbone(name, config.image_size, own)
    if not config.native and config.weights is not None:
        raise UserError(f"{config.weights} holds no model that was trained unmodified: leave out --model.native False")
    if not config.native and config.name is not None:
        return LibraryBackbone(config.name, config.image_size)
    if not config.native:
        raise UserError("--model.native False is for models of other libraries: pass --model.name LIBRARY:MODEL")
    try:
        architecture, state = _architecture(config)
    except Unsupported as error:
        assert config.name is not None
        try:
            unmodified = LibraryBackbone(config.name, config.image_size)
        except UserError as neither:
            raise UserError(f"{error}; {neither}") from error
        print(f"note: {error}. So it is: {COST}", file=sys.stderr)
        return unmodified
    backbone = VisionTransformer(architecture)
    if state is not None:
        load_backbone(backbone, state)
    elif str(config.weights) != "random":
        assert config.weights is not None
        load_backbone(backbone, config.weights)
    return backbone


def _architecture(config: ModelConfig) -> tuple[VisionTransformerConfig, State | None]:
    """The architecture, and the weights where they come with it from another library."""
    if config.weights is None and config.name is not None:
        return load_source(config.name, config.image_size)
    stored = None if config.weights is None else read_architecture(config.weights)
    stored = stored and stored.resized(config.image_size)
    if config.name is not None:  # a run's own weights, which started from that model
        return stored or load_source(config.name, config.image_size)[0], None
    return preset(config.arch).resized(config.image_size), None


def initial_model(
    config: TrainConfig, classes: Sequence[str], processes: Processes, divided: bool
) -> tuple[ImageClassifier, State | None, str]:
    """The classifier that a run starts from, its weights where they are apart from it, and their fingerprint.

    If it is to be divided among the processes, it lies on the meta device, and the main process has its weights, on the
    CPU.

    Raises:
        As `build_model`.
    """

    def build() -> ImageClassifier:
        return build_model(config.model, len(classes), config.seed, classes)

    if not divided:
        model = build()
        return model, None, fingerprint(model)
    weights: State | None = None

    def look() -> tuple[VisionTransformerConfig, str]:
        nonlocal weights
        model = build()
        weights = model.state_dict()
        return model.transformer.config, fingerprint(model)

    architecture, started = processes.on_main(look)
    with torch.device("meta"):
        head = HEADS[config.model.head_kind](architecture.feature_dim, len(classes))
        return ImageClassifier(VisionTransformer(architecture), head), weights, started


def _load_head(config: ModelConfig, head: CosineClassifier | LinearClassifier, classes: Sequence[str] | None) -> None:
    """Weight and bias from the head's own file or from that of the whole classifier, if it holds any."""
    path = config.head or config.weights
    if path is None or str(path) == "random":
        return
    if not path.is_file():
        raise FileNotFoundError(f"no head at {path}")
    state = read_state(path)
    # Whatever a trainer put in front of the names.
    if config.head is None:  # another library's file has a head on other classes, if any, or a projection
        found = [re.sub(r"backbone\.patch_weight$", "head.weight", name) for name in state if OURS.fullmatch(name)]
        if UNMODIFIED in read_metadata(path):
            found = ["head.weight"]
        if not state.keys() & set(found):
            return
    else:
        weights = [name for name in state if re.fullmatch(r"(.+\.)?weight", name)]
        found = [name for name in weights if re.fullmatch(r"(.*head\.)?weight", name)] or weights
    if len(found) != 1:
        raise UserError(f'{path} must hold one head, "weight" [classes, D], it holds {", ".join(sorted(state)[:4])}')
    weight, bias = state[found[0]], state.get(f"{found[0].removesuffix('weight')}bias")
    if weight.shape != head.weight.shape:
        raise UserError(
            f"the head in {path} is {list(weight.shape)}, but there are {head.weight.shape[0]} class folders and "
            f"features of size {head.weight.shape[1]}"
        )
    if bias is not None and bias.shape != head.bias.shape:
        raise UserError(f"the head's bias in {path} is {list(bias.shape)}, not {list(head.bias.shape)}")
    if not weight.is_floating_point():
        raise UserError(f"the head in {path} is {weight.dtype}, it must be of a float dtype")
    _check_metadata(path, config.head_kind, classes)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.zeros_like(head.bias) if bias is None else bias)


def _check_metadata(path: Path, kind: str, classes: Sequence[str] | None) -> None:
    """What a head says of itself must be what it is used for."""
    stored = read_metadata(path)
    if (own := stored.get("head_kind", kind)) != kind:
        raise UserError(f"the head in {path} is a {own} one: pass --model.head-kind {own}, or another head")
    names = read_class_names(path)
    if names is None or classes is None or [*map(composed, names)] == [*map(composed, classes)]:
        return
    at = next(i for i, (name, folder) in enumerate(zip_longest(names, classes)) if name != folder)
    name, folder = (items[at] if at < len(items) else None for items in (names, classes))
    raise UserError(
        f"the head in {path} is of other classes than the training folders: output {at} is {name!r}, the folder "
        f"{folder!r}; make it from these folders' names, in this order (python -m maskcf_fast.zeroshot)"
    )


def describe(model: ImageClassifier, classes: Sequence[str]) -> dict[str, str]:
    """What a file with the model's weights says of them: architecture, kind of head, and names of the outputs."""
    kind = next(name for name, head in HEADS.items() if type(model.head) is head)
    backbone = model.backbone
    if isinstance(backbone, VisionTransformer):
        own = architecture_metadata(backbone.config)
    else:
        own = {UNMODIFIED: cast(LibraryBackbone, backbone).config.name}
    return {**own, "head_kind": kind, "classes": json.dumps(list(classes))}


def build_method(config: MethodConfig, student: ImageClassifier) -> Method:
    """The method that the settings describe, with a copy of the student as it is now for its teacher."""
    return registry.build_method(config.name, student, {**vars(config), "strategy": config.mask_strategy()})


def build_optimizer(
    config: OptimConfig,
    method: Method,
    total_steps: int,
    captured_on: torch.device | None = None,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW on what of the method is to be trained, and its one-cycle schedule.

    Args:
        config: The optimiser's settings.
        method: Its parameters that do not require gradients are left out.
        total_steps: Length of the schedule.
        captured_on: Where a CUDA graph shall capture the update: the learning rate lies there, for the graph to read
            what the schedule writes.
    """
    groups = parameter_groups(config, method)
    rates = [cast(float, group["lr"]) for group in groups]
    if captured_on is not None:
        groups = [{**group, "lr": torch.tensor(group["lr"], device=captured_on)} for group in groups]
    warmup = config.warmup
    if warmup * total_steps == 1:  # a rise of one step: torch divides by its length less one
        warmup -= 1e-9
    optimizer = torch.optim.AdamW(
        groups,
        betas=(0.9, 0.999),
        weight_decay=method.weight_decay if config.weight_decay is None else config.weight_decay,
        fused=True,
        capturable=captured_on is not None,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rates,
        total_steps=total_steps,
        pct_start=warmup,
        cycle_momentum=config.cycle_beta1,
    )
    return optimizer, schedule


def scan(config: DataConfig, processes: Processes, seed: int) -> tuple[Manifest, dict[str, Manifest]]:
    """The training images, and every test set by its name ("holdout", "id", or its folder's).

    The main process looks first and remembers what it found; the others read that. ``seed`` draws what is held out,
    unless the settings say another.
    """
    options: dict[str, Any] = {"on_bad_image": config.on_bad_image, "verify": config.verify, "upright": config.exif}
    options["progress"] = processes.main
    chosen = {} if config.val is None else {"holdout": config.val}
    found: dict[str, Manifest] = {}

    def look() -> None:
        assert config.train is not None
        for name, folder in {"train": config.train, **chosen, **named_test_sets(config)}.items():
            found[name] = scan_images(folder, **options)
            found["train"].require_same_classes(found[name])

    processes.on_main(look)
    if not processes.main:
        look()
    train = found.pop("train")
    seed = seed if config.holdout_seed is None else config.holdout_seed
    holdout = _held_out(config, len(train), processes.main)
    if holdout:
        try:
            train, held_out = train.holdout(holdout, seed)
        except ValueError as error:
            raise UserError(f"{error}: lower --data.holdout (0 holds out none)") from error
        found = {"holdout": held_out, **found}
    return train, found


def _held_out(config: DataConfig, images: int, tell: bool) -> int:
    """How many of the training images are held out."""
    if config.holdout != "paper":
        return config.holdout
    count = 0 if config.val is not None else min(PAPER_HOLDOUT, max(1, images // 10))
    if tell and 0 < count < PAPER_HOLDOUT:
        print(
            f"{count} of the {images} training images are held out to choose the epoch; the paper's {PAPER_HOLDOUT:,} "
            "would be more than a tenth (--data.holdout N holds out N, --data.val DIR chooses by others)",
            file=sys.stderr,
        )
    return count


def as_benchmark(name: str, images: Manifest) -> Benchmark:
    """A test set of the training's own classes."""
    n = len(images.classes)
    return Benchmark(name, "folder", images, torch.eye(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool))


def named_test_sets(config: DataConfig) -> dict[str, Path]:
    """Where the test sets lie, by their names: "id", and those of their folders.

    Raises:
        ValueError: Two of the same name.
    """
    sets = {"id": config.id} if config.id is not None else {}
    for folder in config.ood:
        sets[_unused_name(folder, sets)] = folder
    return sets


def _unused_name(folder: Path, taken: Iterable[str]) -> str:
    if folder.suffix == ".tar":  # a pattern, such as ood/{000..009}.tar
        folder = folder.parent
    name = folder.resolve().name
    if name in (*taken, "id", "holdout"):
        name = "/".join(folder.resolve().parts[-2:])
    if name in taken:
        raise UserError(f"two test sets are called {name}: {folder}")
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
        raise UserError(
            f"optim.batch_size={config.optim.batch_size} does not divide into {processes.world_size} process(es) × "
            f"accumulate={config.optim.accumulate}"
        )
    method = config.method
    refills = METHODS[method.name].masks and method.mask_strategy().filling.other_images
    if (refills or config.data.mixup) and config.optim.batch_size == parts:
        what = method.strategy if refills else "data.mixup"
        raise UserError(
            f"{what} needs a micro-batch of at least 2 images, got 1: no other image to draw from; "
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
