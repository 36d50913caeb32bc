"""The settings of a training run. Their defaults are the paper's; every field is a command-line option.

YAML files hold the same fields, nested in the same way. They are turned into command-line arguments, so that
both are checked by one parser and later arguments win.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml

from ..core.command import read_settings
from ..core.errors import UserError
from ..core.files import read_yaml
from ..core.names import unknown
from ..core.optional import need
from ..data.loader import MOST_SEED, MOST_THREADS, Augment
from ..methods import METHODS, MaskStrategy, strategy_names
from ..methods.trajectory import Average, check_average
from ..models import Shape, preset
from ..models.weights import read_metadata

POSITIVE = (
    "optim.epochs", "optim.batch_size", "optim.accumulate", "optim.lr", "optim.clip", "method.cam_every",
    "method.temperature", "log_every", "keep",
)  # fmt: skip
NOT_NEGATIVE = (
    "data.holdout", "data.holdout_seed", "data.threads", "data.mixup", "method.weight", "optim.weight_decay",
    "checkpoint_every", "checkpoint_minutes", "eval_every", "seed",
)  # fmt: skip
OTHERWISE = {"data.holdout": "paper", "data.holdout_seed": None, "method.weight": None, "optim.weight_decay": None}
MOST_STEPS = 2**24  # that AdamW counts: in float32
NONE = {"null": "None", "~": "None", "": "None"}  # what YAML's words are on the command line
BOOL = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}


@dataclass(frozen=True)
class ModelConfig:
    """The model that is fine-tuned, and where its weights come from."""

    arch: str = "ViT-B/32"
    """Preset: ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336, SigLIP-B/16 or tiny."""
    weights: Path | None = None
    """Pre-trained weights (.safetensors of this package, open_clip, Hugging Face or timm); teacher and start of the
    student. "random" starts from scratch."""
    head: Path | None = None
    """Zero-shot head (.safetensors with "weight" [classes, D], as CosineClassifier.from_text makes it). By
    default the head in the weights file, if there is one, or a random one."""
    image_size: int | None = None
    """Side of the images in pixels, which are square: a multiple of the patch's, by default the model's own. Position
    embeddings are resampled as the model's library does it."""
    name: str | None = None
    """In place of arch and weights, a model of another library with its own architecture and weights:
    open_clip:MODEL/PRETRAINED, hf:ID_OR_FOLDER (CLIP, SigLIP, ViT, DINO) or timm:MODEL.TAG. Weights that a run of
    such a model wrote may be given with it."""
    native: bool = True
    """False: run the model of another library unmodified, by a slower path. It is taken by itself, with a notice, for
    models that the compact vision transformer cannot express."""
    head_kind: Literal["cosine", "linear"] = "cosine"
    """cosine: on the feature's direction, as CLIP's zero-shot classifier; linear: on the feature itself, for models
    without a text tower."""


@dataclass(frozen=True)
class DataConfig:
    """Images on disk: a folder of class folders, or WebDataset tar shards (a folder or shards/{000..009}.tar)."""

    train: Path | None = None
    """Training images. Without it, the embedded demo runs."""
    id: Path | None = None
    """In-distribution test images."""
    ood: tuple[Path, ...] = ()
    """Out-of-distribution test images, any number of sets."""
    holdout: int | Literal["paper"] = 0
    """Training images held out, stratified by class, to choose the best epoch. paper: 10,240 as of ImageNet, or a tenth
    of fewer than 102,400; none where --data.val is given."""
    holdout_seed: int | None = None
    """Which images are held out: by default others for each --seed, as the paper; with a number always the same."""
    val: Path | None = None
    """Validation images that choose the best epoch, in place of training images that are held out."""
    augment: Augment = "none"
    """none: resize and centre crop, as the paper; crop-flip: random-resized crop and horizontal flip;
    randaugment: these and RandAugment, two operations of strength 9. Only none with a cache."""
    mixup: float = 0.0
    """Mix the images of a micro-batch and their labels in pairs, by a share from Beta(mixup, mixup), such as 0.2; 0:
    none. Not with masks: the map that cuts them is of one label."""
    backend: Literal["auto", "dali", "torch"] = "auto"
    """What decodes the images; auto takes DALI where it is installed."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at unreadable images, or leave them out and list them."""
    verify: bool = True
    """Decode every new image once before the run; what was found is remembered."""
    exif: bool = True
    """Turn images as the orientation in their EXIF or XMP data says; the paper did not."""
    threads: int = 2
    """Decoding threads per process."""
    cache: Literal["none", "disk", "device"] = "none"
    """Decode every image once and keep its pixels: in files for all runs (disk), or in the device's memory."""


@dataclass(frozen=True)
class MethodConfig:
    """What is trained on."""

    name: str = "counterfactual"
    """One of the methods above."""
    strategy: str = "object-single"
    """One of the strategies above: which patches are masked, and what fills them."""
    threshold: float | None = None
    """Cut on the normalised relevance; by default the paper's for the strategy."""
    top_k: int | None = None
    """Mask this many patches instead of cutting at a threshold."""
    rate: float | None = None
    """Share of patches that a random strategy masks; by default the paper's."""
    weight: float | None = None
    """Weight of the distillation loss, by default 30, or of the penalty of l2-sp, by default 0.1."""
    temperature: float = 10.0
    """Softening of the logits in kd and cf-kd."""
    cam: Literal["relevance", "gradcam"] = "relevance"
    """The map that masks are cut from: attention relevance, or Grad-CAM on the last block."""
    cam_target: Literal["logit", "logprob"] = "logit"
    """What the map explains: the label's logit, as the paper; or its log-probability, which sets it against its
    rivals and costs no backward pass."""
    start_layer: int = 0
    """First layer that counts in the relevance map; negative counts from the last."""
    cam_source: Literal["student", "teacher"] = "student"
    """Whose map masks are cut from: the student's as it is now, as the paper, or the frozen teacher's."""
    cam_every: int = 1
    """Epochs from one map of an image to the next. 1: every step makes its own, as the paper; more is approximate: in
    between, steps reuse the image's mask and cost one forward pass less."""
    donors: Literal["permutation", "others"] = "permutation"
    """Single-fill: a permutation of the batch, as the paper, in which an image may draw itself; or never itself."""
    ema_teacher: Average = 0.0
    """The teacher follows the student as an exponential moving average with this decay, such as 0.999. 0: frozen, as
    the paper's. beta: the average of all of its steps, the first and last of which count most."""

    def mask_strategy(self) -> MaskStrategy:
        """The strategy that the settings describe."""
        return MaskStrategy.from_name(
            self.strategy,
            threshold=self.threshold,
            top_k=self.top_k,
            rate=self.rate,
            exclude_self=self.donors == "others",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW under a one-cycle schedule."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 512
    """Images per optimiser step, over all processes and accumulated micro-batches."""
    accumulate: int = 1
    """Micro-batches per optimiser step. Donor images come from the same micro-batch."""
    lr: float = 3e-5
    """Peak learning rate."""
    weight_decay: float | None = None
    """Decoupled, on all parameters; by default 0.1; none for lp, and none for l2-sp, whose penalty takes its place."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    warmup: float = 0.02
    """Share of the steps in which the learning rate rises, from lr/25."""
    cycle_beta1: bool = True
    """Let beta1 fall from 0.95 to 0.85 and rise again, against the learning rate; otherwise 0.9."""
    ema_student: Average = 0.0
    """Evaluate and save, in place of the student as it is, the exponential moving average of its weights with this
    decay; or (beta) the average of all of its steps, the first and last of which count most. 0: as it is."""
    last_blocks: int | None = None
    """Train the last n blocks and what comes after them only. By default everything."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank, and the head, in place of the weights. They are merged into these in all
    that is saved but checkpoints. 0: none."""
    lora_alpha: float | None = None
    """Adapters count alpha / rank times; by default alpha is the rank."""
    lora_layers: tuple[Literal["attn.qkv", "attn.out", "fc", "proj"], ...] = ("attn.qkv", "attn.out")
    """The layers of a block that get adapters."""
    layer_decay: float = 1.0
    """The learning rate's factor from a block to the one before it, such as 0.75; 1: the same everywhere."""

    def total_steps(self, per_epoch: int) -> int:
        """How many steps all epochs have, if AdamW can count them.

        Raises:
            ValueError: There are too many.
        """
        if (steps := self.epochs * per_epoch) > MOST_STEPS:
            raise UserError(
                f"optim.epochs={self.epochs} of {per_epoch} steps are more than the {MOST_STEPS:,} that AdamW counts: "
                "lower --optim.epochs, or raise --optim.batch-size"
            )
        return steps

    def validate(self, method: str) -> None:
        """Check what is trained.

        Raises:
            ValueError: A setting is out of its range, or makes no sense with another or with the method.
        """
        lora, decay = self.lora_rank, self.layer_decay
        self.total_steps(1)
        check_average("optim.ema_student", self.ema_student)
        if lora < 0:
            raise UserError(f"optim.lora_rank must not be negative, got {lora}")
        if self.last_blocks is not None and self.last_blocks < 1:
            raise UserError(f"optim.last_blocks must be at least 1, got {self.last_blocks}: the method lp trains none")
        if not 0 < decay <= 1:
            raise UserError(f"optim.layer_decay must lie in (0, 1], got {decay}")
        if self.lora_alpha is not None and not (lora and 0 < self.lora_alpha < float("inf")):
            raise UserError(f"optim.lora_alpha must be positive and go with --optim.lora-rank, got {self.lora_alpha}")
        if not lora and self.lora_layers != OptimConfig.lora_layers:
            raise UserError(f"optim.lora_layers={self.lora_layers} goes with --optim.lora-rank, which is 0")
        if lora and not 0 < len(set(self.lora_layers)) == len(self.lora_layers):
            raise UserError(f"optim.lora_layers needs at least one layer, and none twice, got {self.lora_layers}")
        asked = {"lora_rank": lora, "last_blocks": self.last_blocks, "layer_decay": decay if decay < 1 else None}
        given = [f"optim.{name}={value}" for name, value in asked.items() if value]
        if given and method == "lp":
            raise UserError(f"{given[0]} has no effect on lp, which trains the head alone: leave it out, or take ft")
        if lora and method == "l2-sp":
            raise UserError(f"{given[0]} rests the weights that l2-sp has its penalty on: leave it out, or take ft")


@dataclass(frozen=True)
class TrainConfig:
    """Robust fine-tuning with counterfactual masking.

    Without --data.train, the embedded demo runs: it needs no data, no weights and no GPU.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    out: Path | None = None
    """Folder of the run; runs/<method> by default. It must not hold another run."""
    resume: Path | None = None
    """Folder of an interrupted run to continue exactly, with its own settings. "auto": the run in --out is continued if
    it has a checkpoint, else begun, so that one command serves for both."""
    seed: int = 0
    """Of the order of the images, the donors and random masks, and random weights."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32: fp32 with the matrix products in TF32, on NVIDIA GPUs, as the paper probably had it; bf16: bfloat16 with
    float32 weights, losses and statistics."""
    compile: bool = False
    """Compile what lies between the matrix products."""
    cuda_graph: bool = False
    """Capture the step's forward and backward passes as one CUDA graph, and the update as another where beta1 rests.
    Memory for them stays reserved."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: a whole model in each, or (fsdp) its parameters divided among them."""
    recompute: bool | Literal["gelu"] = False
    """Activation checkpointing: keep each block's input only, for less memory and more arithmetic; or (gelu) compute
    the results of GELU again and keep the rest, for a little of both."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 0
    """Steps between checkpoints; each epoch also ends with one. 0: none are counted."""
    checkpoint_minutes: float = 10.0
    """Minutes after which the next step makes a checkpoint. 0: never."""
    keep: int = 2
    """Checkpoints to keep: if the newest is found damaged, the run continues from the one before."""
    elastic: bool = False
    """Continue under another number of processes than the checkpoint's: with the same images in batches of the same
    size, but other donors and random masks, which each process draws for its own."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Where loss or gradient is not finite: stop, or leave the step out (20 at most). Either way the batch's images are
    written down."""
    eval_every: int = 1
    """Epochs between evaluations; the start and the end are always evaluated. 0: these only."""

    def validate(self) -> None:
        """Check what no data or weights are needed for.

        Raises:
            ValueError: A setting is out of its range, or an unknown strategy or model (the nearest is suggested).
        """
        for name in POSITIVE:
            if not 0 < (value := attrgetter(name)(self)) < float("inf"):
                raise UserError(f"{name} must be positive and finite, got {value}")
        if self.data.threads > MOST_THREADS:
            raise UserError(f"data.threads must be at most {MOST_THREADS}, got {self.data.threads}")
        for name in NOT_NEGATIVE:
            value = attrgetter(name)(self)
            if name in OTHERWISE and value == OTHERWISE[name]:
                continue
            if not 0 <= value < float("inf"):
                raise UserError(f"{name} must {'not be negative' if value < 0 else 'be finite'}, got {value}")
        if self.data.val is not None and self.data.holdout not in (0, "paper"):
            raise UserError(
                f"data.val={self.data.val} chooses the epoch, data.holdout={self.data.holdout} images need not: "
                "--data.holdout 0, or no --data.val"
            )
        if self.seed > MOST_SEED:
            raise UserError(f"seed must be at most {MOST_SEED}, got {self.seed}")
        if not 0 <= self.optim.warmup < 1:
            raise UserError(f"optim.warmup must lie in [0, 1), got {self.optim.warmup}")
        check_average("method.ema_teacher", self.method.ema_teacher)
        self.optim.validate(self.method.name)
        method = METHODS[self.method.name]
        if self.method.ema_teacher and not method.distils:
            raise UserError(f"method.ema_teacher needs a method with a teacher, {self.method.name} has none")
        if self.optim.lora_rank and self.parallel == "fsdp":
            raise UserError(f"optim.lora_rank={self.optim.lora_rank} does not go with --parallel fsdp: use ddp")
        if self.data.mixup and method.masks:
            raise UserError(
                f"data.mixup={self.data.mixup} does not go with {self.method.name}: a mixed image has two labels, "
                "a map and its mask have one; use --data.mixup 0, or a method without masks"
            )
        if self.parallel == "fsdp" and not method.fsdp:
            raise UserError(f"{self.method.name} does not go with --parallel fsdp: use --parallel ddp")
        if self.method.cam_every > 1:
            self._check_masks_can_be_kept()
        if self.model.name is None:
            self.check_fits(preset(self.model.arch).resized(self.model.image_size), self.model.arch)
        elif self.model.weights is not None and not {"architecture", "unmodified"} & set(
            read_metadata(self.model.weights)
        ):
            raise UserError("--model.name brings its own weights: leave out --model.weights, or --model.name")

    def _check_masks_can_be_kept(self) -> None:
        every, method = f"method.cam_every={self.method.cam_every}", self.method
        if not METHODS[method.name].masks:
            raise UserError(f"{every} is for methods with masks, {method.name} has none: use 1")
        if not method.mask_strategy().needs_cam:
            raise UserError(f"{every} is for object and context masks, {method.strategy} has no map: use 1")
        if self.data.augment != "none":
            raise UserError(
                f"{every} reuses an image's mask, but data.augment={self.data.augment} makes another picture of it "
                "each time: use --method.cam-every 1 or --data.augment none"
            )
        if self.parallel == "fsdp":
            raise UserError(f"{every} does not go with --parallel fsdp: use --parallel ddp")

    def check_fits(self, model: Shape, name: str) -> None:
        """Check the method's settings against an architecture.

        Raises:
            ValueError: More patches to mask, more blocks to train, or another first layer, than the model has.
        """
        strategy = self.method.mask_strategy()
        asked = {
            "parallel fsdp": self.parallel == "fsdp",
            "recompute": bool(self.recompute),
            "compile": self.compile,
            "cuda_graph": self.cuda_graph,
            "optim.lora_rank": self.optim.lora_rank,
            "optim.last_blocks": self.optim.last_blocks,
            "optim.layer_decay": self.optim.layer_decay < 1,
            "method.cam gradcam": self.method.cam == "gradcam",
        }
        if not model.native and (given := [option for option, value in asked.items() if value]):
            raise UserError(f"{given[0]} does not go with {name}, which is trained unmodified: leave it out")
        if (self.optim.last_blocks or 0) > model.depth:
            raise UserError(f"optim.last_blocks={self.optim.last_blocks} exceeds the {model.depth} blocks of {name}")
        if strategy.top_k is not None and strategy.top_k > model.num_patches:
            raise UserError(f"method.top_k={strategy.top_k} exceeds the {model.num_patches} patches of {name}")
        if not -model.depth <= self.method.start_layer < model.depth:
            raise UserError(
                f"method.start_layer must lie in [{-model.depth}, {model.depth - 1}], got {self.method.start_layer}"
            )


def check_seeds(seeds: Collection[int]) -> None:
    """Raise a ValueError if there is no seed, one twice, or one that no run takes."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds needs at least one seed, and none twice")
    if bad := [seed for seed in seeds if not 0 <= seed <= MOST_SEED]:
        raise UserError(f"--seeds must be from 0 to {MOST_SEED}, got {bad[0]}")


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML that `yaml_arguments` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


# The images are told by their fingerprint, not by where they lie. The rest changes no weight.
FREE = {
    "out", "resume", "data.train", "data.val", "data.id", "data.ood", "data.threads", "data.cache", "log_every",
    "checkpoint_every", "checkpoint_minutes", "keep", "elastic", "on_nan", "compile", "cuda_graph", "parallel",
    "recompute",
}  # fmt: skip


def changed_settings(config: TrainConfig, path: Path, free: Collection[str] = ()) -> list[str]:
    """What differs from the settings in a run's ``config.yaml``, of all that decides the result, less ``free``.

    Raises:
        OSError, ValueError: The file cannot be read, or holds no settings.
    """

    def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in content.items():
            name = f"{prefix}{key}"
            items |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
        return items

    # A run of an earlier version lacks the settings that came later: it ran with their defaults.
    default, new = (flat(yaml.load(to_yaml(c), yaml.BaseLoader)) for c in (TrainConfig(), config))
    old = default | flat(_read_settings(path))
    return [
        f"--{name.replace('_', '-')} (was {_number(old.get(name))}, is {_number(new.get(name))})"
        for name in {**new, **old}
        if name not in FREE.union(free) and _number(old.get(name)) != _number(new.get(name))
    ]


def _number(text: Any) -> Any:
    """A text's number, if it is one: 30 and 30.0 are the same setting."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            pass
    return text


def yaml_arguments(path: Path) -> list[str]:
    """A YAML file's settings as command-line arguments.

    Raises:
        ValueError: Not YAML, or a key that is no setting (the nearest is suggested).
    """
    return _flatten(_read_settings(path), TrainConfig, path, "")


def _read_settings(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold settings by name, such as 'seed: 1'")
    return content


def _flatten(content: dict[str, Any], kind: type, path: Path, prefix: str) -> list[str]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments: list[str] = []
    for key, value in content.items():
        if key not in fields:
            raise unknown("setting", f"{prefix}{key}", (prefix + name for name in fields), str(path))
        section = fields[key].default_factory
        if isinstance(section, type):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {prefix}{key} must hold settings by name, got {value!r}")
            arguments += _flatten(value, section, path, f"{prefix}{key}.")
        else:
            values = value if isinstance(value, list) else [value]
            texts = [text for text in values if isinstance(text, str)]
            if len(texts) < len(values):
                raise UserError(f"{path}: {prefix}{key} must be a value or a list of values, got {value!r}")
            plain: dict[str, str] = {**NONE, **(BOOL if "bool" in str(fields[key].type).split(" | ") else {})}
            arguments += [f"--{prefix}{key}".replace("_", "-"), *(plain.get(text.lower(), text) for text in texts)]
    return arguments


def find_yaml(name: str) -> Path:
    """A YAML file by its path, or one that comes with the package by its name.

    Raises:
        ValueError: Neither (the nearest name is suggested).
    """
    if (own := Path(name).expanduser()).is_file():
        return own
    presets = {Path(str(p)).stem: Path(str(p)) for p in resources.files("maskcf_fast.configs").iterdir()}
    presets = {stem: path for stem, path in presets.items() if path.suffix == ".yaml"}
    if name in presets:
        return presets[name]
    raise unknown("preset or file", name, sorted(presets))


def parse(arguments: Sequence[str] | None = None, *, name: str = "train") -> TrainConfig:
    """The settings from a command line; exits with a message on a bad one.

    ``--config NAME_OR_FILE`` comes first and takes the settings of a preset or YAML file; ``--resume DIR``
    takes those of the run.
    """
    need("tyro")
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]
    own = list(arguments)
    for option, value in pairwise(own):
        if option.replace("_", "-") == "--model.image-size" and re.fullmatch(r"\d+[x,×]\d+", value):
            raise UserError(
                f"{option} {value}: images are square, as the models' grids of positions are; give one side"
            )
    for option in ("--config", "--resume"):
        if own.count(option) > 1:
            raise UserError(f"{option} is given {own.count(option)} times: give it once")
    source = None
    if "--config" in own:
        at = own.index("--config")
        if at + 1 >= len(own):
            raise UserError("--config needs the name of a preset or a YAML file")
        source = find_yaml(own[at + 1])
        del own[at : at + 2]
    if "--resume" in own and own[own.index("--resume") + 1 :][:1] not in ([], ["auto"]):
        if source is not None or "--out" in own:
            raise UserError(
                "--resume DIR continues a run with its own settings in its own folder: no --config, no --out"
            )
        folder = Path(own[own.index("--resume") + 1]).expanduser()
        source = folder / "config.yaml"
        if not source.is_file():
            run = next((above for above in folder.parents if (above / "config.yaml").is_file()), None)
            remedy = f"take --resume {run}" if run else "give the folder that a run's --out was"
            raise FileNotFoundError(f"{folder} is no run to resume, it has no config.yaml: {remedy}")
    read = _without_replaced_cuts(yaml_arguments(source), own) if source else []
    listed = "\n".join(f"  {name}: {entry.about}" for name, entry in METHODS.items())
    config = read_settings(
        TrainConfig,
        own,
        name,
        read,
        config=(tyro.conf.FlagConversionOff,),
        description=f"{DESCRIPTION}\n\nMethods:\n{listed}\n\nStrategies: {', '.join(strategy_names())}",
    )
    if "--resume" not in own and str(config.resume or "auto") != "auto":
        raise UserError(
            f"{source}: resume: {config.resume} is for the command line: --resume {config.resume} (or auto)"
        )
    method = METHODS[config.method.name]
    read_by_it = {"name", *method.reads, *(OF_MASKS if method.masks else ())}
    for option in own:
        section, _, setting = option.replace("-", "_").partition("method.")
        if section == "__" and setting not in read_by_it:
            raise UserError(f"{option} has no effect on {config.method.name}, which does not read it: leave it out")
    return config


OF_MASKS = ("threshold", "top_k", "rate", "donors", "cam_every")  # what a strategy is made with and kept for


def _without_replaced_cuts(read: Sequence[str], own: Sequence[str]) -> list[str]:
    """A file's arguments without the cut of its strategy, where the command line names another strategy or cut."""
    cuts = ("--method.threshold", "--method.top-k", "--method.rate")
    if not {"--method.strategy", *cuts} & {argument.replace("_", "-") for argument in own}:
        return list(read)
    return [a for before, a in zip(["", *read], read, strict=False) if not {before, a} & set(cuts)]


DESCRIPTION = """Fine-tune a pre-trained CLIP vision transformer so that it keeps its out-of-distribution accuracy.

Without --data.train, runs the embedded demo (no data, weights or GPU needed).
--config NAME|FILE, given first, takes the settings of a preset (object-single, context-multi, …) or a YAML file."""
