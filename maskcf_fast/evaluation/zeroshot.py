"""``python -m maskcf_fast.zeroshot``: a zero-shot head from a model's text tower."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError
from ..core.files import check_writable, composed, read_lines
from ..core.optional import need
from ..core.processes import choose_device
from ..data.scan import class_folders
from ..models import CosineClassifier
from ..models.sources import load_text_tower
from .classes import WNID, imagenet_classes, some

Templates = Sequence[str | Callable[[str], str]]


@dataclass(frozen=True)
class ZeroShotConfig:
    """Make a zero-shot head: one direction per class, the mean of its prompts' text features."""

    model: str
    """open_clip:MODEL/PRETRAINED, or hf:ID_OR_FOLDER of a CLIP or SigLIP, as for --model.name of training."""
    classes: str
    """"imagenet" (open_clip's names of its 1000 classes, in the order of the WordNet ids), the training folder, or a
    file with one class folder per line, sorted as the folders are, and after a tab what to call it in prompts.
    Folders that are WordNet ids are called by their names."""
    out: Path
    """File for the head, for --model.head of training."""
    templates: str = "openai"
    """"openai" (the 80 of CLIP's paper), "simple" (7 of them), or a file with one prompt per line, {} for the class."""
    batch_size: int = 16
    """Classes encoded at a time."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


def text_directions(
    encode: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Templates,
    batch_size: int = 16,
) -> Tensor:
    """One direction per class: the mean of its prompts' unit text features, normalised (Radford et al., 2021).

    Args:
        encode: Prompts to features ``[prompts, D]``, such as `TextTower.encode`.
        names: What the classes are called in prompts.
        templates: Prompts: strings with ``{}`` for the class, or functions of it.
        batch_size: Classes encoded at a time.

    Returns:
        float32 ``[classes, D]`` on the CPU, rows of length 1.
    """
    from tqdm import tqdm

    rows = []
    with torch.no_grad(), tqdm(total=len(names), desc="classes", leave=False) as progress:
        for at in range(0, len(names), batch_size):
            some = names[at : at + batch_size]
            prompts = [t.format(name) if isinstance(t, str) else t(name) for name in some for t in templates]
            features = F.normalize(encode(prompts).float(), dim=-1)
            rows.append(F.normalize(features.unflatten(0, (len(some), -1)).mean(dim=1), dim=-1).cpu())
            progress.update(len(some))
    return torch.cat(rows)


def read_names(source: str) -> tuple[list[str], list[str]]:
    """Class folders, and what the classes are called in prompts; WordNet ids by their names in WordNet.

    Raises:
        FileNotFoundError: Neither a file, nor a folder, nor "imagenet".
        ImportError: ImageNet's lists come with open_clip and timm.
        ValueError: No names, a folder twice, two classes with the same prompts, or a WordNet id without a name.
    """
    path = Path(source)
    if source == "imagenet":
        lines = list(imagenet_classes())
    elif path.is_dir():
        lines = list(class_folders(path))
    elif path.is_file():
        lines = read_lines(path)
    else:
        raise FileNotFoundError(f'--classes {source}: neither a file nor a folder (nor "imagenet")')
    if not lines:
        raise UserError(f"--classes {source} holds no class names")
    pairs = [line.partition("\t") for line in lines]
    folders = [folder.strip() for folder, _, _ in pairs]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise UserError(f"--classes {source} names {twice[0]!r} more than once")
    texts = [text.strip() for _, _, text in pairs]
    unnamed = [folder for folder, text in zip(folders, texts, strict=True) if not text and WNID.fullmatch(folder)]
    meant = wordnet_names(unnamed)
    names = [
        composed(text or meant.get(folder) or folder.replace("_", " "))
        for folder, text in zip(folders, texts, strict=True)
    ]
    first: dict[str, str] = {}
    for folder, name in zip(folders, names, strict=True):
        other = first.setdefault(" ".join(name.casefold().split()), folder)  # text towers read no more of it
        if other == folder:
            continue
        if other in meant and folder in meant:  # as published: ImageNet has two missiles and two sunglasses
            print(f"note: {other} and {folder} are both called {name!r}: they have the same prompts", file=sys.stderr)
            continue
        raise UserError(
            f"--classes {source}: {other!r} and {folder!r} have the same prompts, with {name!r}: give a file with one "
            "class folder per line, and after a tab what to call it"
        )
    return folders, names


def wordnet_names(ids: Sequence[str]) -> dict[str, str]:
    """What WordNet ids stand for: ImageNet's 1000 classes as CLIP's authors call them, others as WordNet does.

    Raises:
        ImportError: Those lists come with open_clip and timm.
        ValueError: An id that is in neither.
    """
    if not ids:
        return {}
    names = dict(zip(imagenet_classes(), _open_clip().IMAGENET_CLASSNAMES, strict=True))
    if rest := [wnid for wnid in ids if wnid not in names]:
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-22k")
        known = set(info.label_names())
        if unknown_ids := [wnid for wnid in rest if wnid not in known]:
            raise UserError(
                f"what the WordNet ids {some(unknown_ids)} stand for is not known, and no prompt with an id means "
                "anything: give --classes a file with one id per line, and after a tab what to call it in prompts"
            )
        names |= {wnid: info.label_name_to_description(wnid).partition(",")[0] for wnid in rest}
    return {wnid: names[wnid] for wnid in ids}


def read_templates(source: str) -> Templates:
    """Prompts of open_clip ("openai", "simple") or of a file.

    Raises:
        ImportError: open_clip is not installed.
        FileNotFoundError: No such file.
        ValueError: No prompts, or a prompt without ``{}``.
    """
    if source in ("openai", "simple"):
        lists = _open_clip()
        return lists.OPENAI_IMAGENET_TEMPLATES if source == "openai" else lists.SIMPLE_IMAGENET_TEMPLATES
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f'--templates {source}: no such file (nor "openai" nor "simple")')
    lines = read_lines(path)
    if not lines:
        raise UserError(f"--templates {source} holds no prompts")
    for line in lines:
        if line.count("{}") != 1 or line.replace("{}", "").count("{") or line.replace("{}", "").count("}"):
            raise UserError(
                f"--templates {source}: {line!r} must hold one {{}} for the class, such as 'a photo of a {{}}.'"
            )
    return lines


def _open_clip() -> Any:
    """open_clip, whose templates "openai" and "simple" and names of ImageNet's classes are."""
    need("open_clip", instead="give files of --classes and --templates")
    return import_module("open_clip")


def write_head(config: ZeroShotConfig) -> None:
    """Make the head and write it, with the names of its classes.

    Raises:
        ImportError: The model's library is not installed, or open_clip, of whose lists "openai" and "imagenet" are.
        FileNotFoundError, ValueError: Settings, class names or a model that cannot be used.
    """
    from ..core.tensors import save_tensors

    if config.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {config.batch_size}")
    folders, names = read_names(config.classes)
    templates = read_templates(config.templates)
    folder = config.out.absolute().parent
    check_writable(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {config.out}: there is no folder {folder}")
    if config.out.is_dir():
        raise UserError(f"--out {config.out} is a folder: name a file in it")
    tower = load_text_tower(config.model, str(choose_device(config.device)))
    directions = text_directions(tower.encode, names, templates, config.batch_size)
    head = CosineClassifier.from_text(directions, float(tower.scale))
    metadata = {
        "head_kind": "cosine",
        "classes": json.dumps(folders),
        "prompts": json.dumps(names),
        "model": config.model,
        "templates": config.templates,
    }
    save_tensors(config.out, head.state_dict(), metadata)
    print(f"{config.out}: {len(folders)} classes × {directions.shape[1]} features, scale {float(tower.scale):.4g}")
