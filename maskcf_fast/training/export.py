"""A run's model as a checkpoint that other libraries load."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from ..core.errors import UserError
from ..core.files import check_writable
from ..core.optional import need
from ..core.tensors import save_tensors
from ..explain.backbone import LibraryBackbone
from ..models import Backbone, ImageClassifier, VisionTransformer

Target = Literal["hf", "open_clip", "timm", "onnx"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model for another library."""

    run: Path
    """Folder of a training run."""
    to: Target
    """hf: a folder for from_pretrained; open_clip: weights for model.visual; timm: a folder for create_model; onnx:
    a graph from pixels to logits."""
    out: Path
    """Folder to write, new or empty."""
    weights: Literal["auto", "final", "best"] = "auto"
    """The model after the last epoch, or of the best one; auto is best where held-out images chose it, else final."""
    classes: str | None = None
    """Names of the model's outputs: a file with one per line, or "imagenet". By default the training folder's."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: The folder.
        load: The call that loads it.
        head_inside: Whether it gives the classes' logits; else the head lies beside it in ``head.safetensors``.
    """

    folder: Path
    load: str
    head_inside: bool


def export_model(model: ImageClassifier, classes: Sequence[str], to: Target, out: Path) -> Exported:
    """Write a classifier for another library; the folder appears whole or not at all.

    Args:
        model: The classifier.
        classes: Names of its outputs.
        to: The library.
        out: Folder to write, new or empty.

    Raises:
        ImportError: The library is not installed.
        ValueError: ``out`` is not empty, or the library has no such model.
        OSError: It cannot be written.
    """
    from ..models.sources import LIBRARIES, library
    from .build import describe

    if to not in get_args(Target):
        raise UserError(f"--to {to}: there are {', '.join(get_args(Target))}")
    check_writable(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not an empty folder: choose another")
    if len(classes) != model.head.weight.shape[0]:
        raise UserError(f"the model has {model.head.weight.shape[0]} outputs, got {len(classes)} class names")
    need(LIBRARIES[to][1])
    model = model.cpu().eval()
    parent = out.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name}."))
    try:
        if isinstance(model.backbone, VisionTransformer):
            load, inside = library(to).write(model, classes, work)
        else:
            load, inside = _write_unmodified(model.backbone, to, work), False
        if not inside:
            said = {name: text for name, text in describe(model, classes).items() if name != "architecture"}
            save_tensors(work / "head.safetensors", model.head.state_dict(), said)
        work.chmod(0o755)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(out, load.replace("{out}", str(out)), inside)


def _write_unmodified(backbone: Backbone, to: Target, folder: Path) -> str:
    """The library's own state dict of its own model; how to load it."""
    model = cast(LibraryBackbone, backbone)
    if (own := model.config.name.partition(":")[0]) != to:
        raise UserError(f"{model.config.name} was trained unmodified, as a model of its own library: take --to {own}")
    state = {name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    return f'{model.call}.load_state_dict(safetensors.torch.load_file("{{out}}/model.safetensors"))'


def export_run(config: ExportConfig) -> Exported:
    """Write a run's model; errors as `export_model`, and where the folder is no finished run."""
    from .runs import read_run

    run = read_run(config.run, config.weights, config.classes)
    exported = export_model(run.tuned(), run.classes, config.to, config.out)
    print(f"{run.weights} → {exported.folder}\nload it with: {exported.load}")
    if exported.head_inside:
        print("the head is inside: the model gives the classes' logits")
    else:
        print(f"the head is beside it, in {exported.folder / 'head.safetensors'}: the model gives features")
    return exported
