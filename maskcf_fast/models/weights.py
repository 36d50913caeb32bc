"""Loading weights: this package's own, and those of open_clip, Hugging Face, timm and whoever trained them on."""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import parse_json, read_json
from ..core.schema import conform
from ..core.tensors import LONGEST_HEADER, load_tensors
from .config import Rotary, VisionTransformerConfig
from .naming import NAMINGS, TIMM, State
from .positions import resample_positions
from .vit import VisionTransformer

# Under which trainers keep a state dict, beside their epoch and optimiser; the first that is there is read.
WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "net", "network", "teacher", "student",
    "ema_state_dict", "state_dict_ema", "model_ema", "ema",
)  # fmt: skip
OWN = "make the model of the weights' own (load_source, --model.name), or take others"
INSERTED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # names of torch's wrappers
STRANGE = {  # how files begin that are no weights
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page: download the file itself",
    b"\0": "zeros: its download was not finished",
}


def load_backbone(model: VisionTransformer, weights: str | Path | Mapping[str, Tensor]) -> VisionTransformer:
    """Load the weights of a vision tower into ``model``.

    Recognised by their names, whatever a trainer put in front of them: this package's own weights, a Hugging Face
    ``CLIPModel``, ``CLIPVisionModel(WithProjection)``, ``SiglipModel``, ``SiglipVisionModel``, ``ViTModel`` or
    ``Dinov2Model``, an open_clip model or its ``visual`` part, and a timm ViT. Text towers and heads in the same file
    are passed over. Position embeddings of another image size are resampled, as the library that they come from does.
    No file is read in a way that could execute code.

    Args:
        model: The model to fill, in place.
        weights: Path of a file as `read_state` takes it, or a state dict.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a readable file, unknown names, more than one vision tower, or an architecture other than the
            model's; every missing, unexpected and misshapen tensor is named.
    """
    if not isinstance(weights, str | Path | Mapping):
        raise TypeError(f"weights must be a file's path or a state dict, got {type(weights).__name__}")
    source = f" in {weights}" if isinstance(weights, str | Path) else ""
    state = read_state(Path(weights)) if isinstance(weights, str | Path) else dict(weights)
    stored = read_architecture(Path(weights)) if isinstance(weights, str | Path) else None
    if stored is not None:  # what changes no tensor's shape, such as the base of rotary positions, is compared, too
        ours, theirs = asdict(model.config), asdict(stored.resized(model.config.image_size))
        if differing := [f"{k} is {theirs[k]}, not {ours[k]}" for k in ours if ours[k] != theirs[k]]:
            raise UserError(f"the weights{source} are of another architecture: {', '.join(differing)}; {OWN}")
    state = _translate(state, model.config)
    own = model.state_dict()
    problems = [f"missing {name} {list(own[name].shape)}" for name in own if name not in state]
    problems += [f"unexpected {name} {list(state[name].shape)}" for name in state if name not in own]
    for name in (name for name in own if name in state):
        if state[name].shape != own[name].shape:
            problems.append(f"{name} is {list(state[name].shape)}, the model needs {list(own[name].shape)}")
        elif not state[name].is_floating_point():
            problems.append(f"{name} is {state[name].dtype}, it must be of a float dtype")
    if ("registers" in state) != ("registers" in own):
        held, wanted = (len(tensors.get("registers", ())) for tensors in (state, own))
        problems.insert(0, f"they have {held} registers, the model {wanted}: a registers={held} model takes them")
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise UserError(f"the weights{source} are of another architecture than {model.config}; {OWN}:\n  {shown}")
    model.load_state_dict(state)
    return model


def read_state(path: Path) -> State:
    """The tensors in a file, told by its content and read without executing code.

    Args:
        path: A safetensors file, a pickled state dict (or a trainer's checkpoint that holds one), or the JSON index of
            several such files.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, or holds other things than tensors, or none.
    """
    if not path.is_file():
        hint = ": it is a folder, name the file in it, or the model, such as hf:FOLDER" if path.is_dir() else ""
        raise FileNotFoundError(f"no weights at {path}{hint}")
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER:
        state = load_tensors(path)
    elif start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        state = _read_pickle(path)
    elif start.lstrip().startswith(b"{"):
        state = _read_shards(path)
    else:
        said = next((said for mark, said in STRANGE.items() if start.lstrip().startswith(mark)), "something else")
        raise UserError(f"{path} holds neither safetensors nor a pickled state dict, but {said}")
    if odd := [name for name, t in state.items() if t.layout != torch.strided or t.is_meta or t.is_quantized]:
        raise UserError(f"{path} holds {odd[0]} without its values (meta), sparse or quantised: save it dense")
    state = {INSERTED.sub("", name): tensor for name, tensor in state.items()}
    if all(name.startswith("module.") for name in state):  # of DistributedDataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _read_pickle(path: Path) -> State:
    try:
        if zipfile.is_zipfile(path):  # as torch.save writes it, which compresses nothing
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise UserError(f"{path} would unpack to {unpacked:,} bytes: save it again with torch.save")
        # The settings that many trainers keep. And a file object, since a path is also judged by its suffix.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # an unpickler that meets garbage raises whatever comes up
        called = re.search(r"GLOBAL ([\w.]+)", str(error))  # what stands for an object in the file
        reason = f"holds {called[1]}, and would execute code when loaded" if called else "is damaged"
        raise UserError(
            f"{path} {reason}: only tensors are read from a pickle; where you trust it, save its state_dict() as "
            "safetensors"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict but a {type(content).__name__}")
    for _ in range(3):
        keys = [key for key in WRAPPERS if isinstance(content.get(key), dict) and content[key]]
        if not keys:
            break
        if keys[1:]:
            print(f"note: {path} holds {', '.join(keys)}: {keys[0]} is read", file=sys.stderr)
        content = content[keys[0]]
    state = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not state:
        held = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise UserError(f"{path} holds no state dict but {held}: save model.state_dict() alone")
    return state


def _read_shards(path: Path) -> State:
    """The tensors in the files that an index names."""
    state: State = {}
    for name in indexed_files(path):
        if not (path.parent / name).is_file() or path.parent / name == path:
            raise FileNotFoundError(f"{path.parent} lacks {name}, which {path.name} names")
        state |= read_state(path.parent / name)
    return state


def indexed_files(path: Path) -> list[str]:
    """Names of the files that a JSON index of weights names, all of which lie beside it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no index, or leads to files elsewhere.
    """
    index = read_json(path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f'{path} is JSON, but no index of weights with a "weight_map"')
    names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{path} names {outside[0]!r}, which does not lie beside it: no file elsewhere is read")
    return names


def architecture_metadata(config: VisionTransformerConfig) -> dict[str, str]:
    """What is stored beside this package's own weights, so that the file says what it holds."""
    return {"architecture": json.dumps(asdict(config))}


def read_metadata(path: Path) -> dict[str, str]:
    """What is stored in a safetensors file beside its tensors; nothing for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_class_names(path: Path) -> tuple[str, ...] | None:
    """Names of the outputs that a file of this package's weights has beside them, if any.

    Raises:
        ValueError: They are no names.
    """
    stored, source = read_metadata(path).get("classes"), f"the classes in {path}"
    return None if stored is None else conform(parse_json(stored, source), tuple[str, ...], source)


def read_architecture(path: Path) -> VisionTransformerConfig | None:
    """The architecture that a file of this package's weights names, if it does.

    Raises:
        ValueError: It is none, or asks for more than the file holds.
    """
    stored = read_metadata(path).get("architecture")
    if stored is None:
        return None
    fields = parse_json(stored, f"the architecture in {path}")
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if values.get("pool") == "attention":  # of a version that knew none over a class token
            values.setdefault("class_token", False)
        if values.get("rotary") is not None:
            values["rotary"] = Rotary(**values["rotary"])
        config = VisionTransformerConfig(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} names an architecture that this version does not know: {error}") from error
    check_holds(config, path.stat().st_size, str(path))
    return config


def check_holds(config: VisionTransformerConfig, numbers: int, source: str) -> None:
    """Raise, before anything of its size is made, where an architecture has more parameters than its weights."""
    if config.matrix_parameters > numbers:
        raise UserError(
            f"{source} describes a model of {config.matrix_parameters:,} parameters and holds at most {numbers:,}: it "
            "is damaged, get it again"
        )


def _translate(state: Mapping[str, Tensor], config: VisionTransformerConfig) -> State:
    """The vision tower in ``state``, in this package's names."""
    found = {prefix: naming for naming in reversed(NAMINGS) for prefix in naming.prefixes(state)}
    if not found:
        raise UserError(
            "unknown weight layout: expected this package's, open_clip's, timm's, or Hugging Face's CLIP, SigLIP, ViT "
            f"or DINO names, got {', '.join(sorted(state)[:4]) or 'no tensors'}, …"
        )
    if len(found) > 1:
        raise UserError(
            f"the weights hold several vision towers, under {', '.join(map(repr, sorted(found)))}: keep the tensors of "
            "one"
        )
    ((prefix, naming),) = found.items()
    tower = naming.tower(state, prefix)
    if naming is TIMM:
        tower = _without_head(tower, config)
    tower = naming.to_ours(tower)
    positions, first = tower.get("position_embedding"), config.prefix_positions
    if positions is not None and positions.is_floating_point() and len(positions) != first + config.num_patches:
        side = config.image_size // config.patch_size
        tower["position_embedding"] = resample_positions(positions, first, side, naming.antialias)
    if config.output_dim is None and naming.library != "this package":
        tower.pop("projection", None)
    return tower


def _without_head(state: State, config: VisionTransformerConfig) -> State:
    """timm's ``head`` is CLIP's projection with a bias of zero, or else a classification head."""
    state = dict(state)
    if config.projection_bias:
        return state
    bias = state.pop("head.bias", None)
    if config.output_dim is None:
        state.pop("head.weight", None)
    elif bias is not None and bool(bias.any()):
        raise UserError("the head in these timm weights has a bias: it is a classifier, no projection of features")
    return state
