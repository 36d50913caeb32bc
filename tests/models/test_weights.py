"""Files of weights, whoever wrote them: names, what trainers put around them, damage and hostile content."""

import argparse
import dataclasses
import io
import json
import zipfile
from dataclasses import replace

import pytest
import torch
from families import randomise
from safetensors.torch import save_file

from maskcf_fast.core.errors import UserError
from maskcf_fast.core.tensors import save_tensors
from maskcf_fast.models import Rotary, VisionTransformer, load_backbone, preset
from maskcf_fast.models.naming import OPEN_CLIP
from maskcf_fast.models.sources import load_classifier, load_source
from maskcf_fast.models.weights import architecture_metadata, read_architecture, read_state


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def test_own_weights_round_trip(tmp_path):
    model, other = VisionTransformer("tiny"), VisionTransformer("tiny")
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    load_backbone(other, tmp_path / "own.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_refusals(tmp_path):
    model = VisionTransformer("tiny")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = dict(model.state_dict())
    state["ln_pre.weight"] = torch.zeros(3)
    del state["class_embedding"]
    state["position_embedding"] = torch.zeros(16, 96)  # of the patches alone
    with pytest.raises(ValueError, match=r"16 positions: without the 1 of .* form no square grid .* square images"):
        load_backbone(model, state)
    state["position_embedding"] = torch.zeros(17, 96)
    with pytest.raises(ValueError, match=r"another architecture(?s:.*)missing class_embedding(?s:.*)ln_pre.weight is"):
        load_backbone(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"unknown weight layout.*got foo"):
        load_backbone(model, {"foo": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent"):
        load_backbone(model, tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="it is a folder, name the file in it"):
        load_backbone(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        load_backbone(model, tmp_path / "cut.safetensors")


@pytest.fixture(scope="module")
def tower():
    """A tiny model, and its tensors as an open_clip model's vision tower has them."""
    model = randomise(VisionTransformer("tiny"))
    return model, {f"visual.{name}": t for name, t in OPEN_CLIP.to_theirs(model.state_dict()).items()}


def prefixed(prefix, tower):
    return {prefix + name: tensor for name, tensor in tower.items()}


TRAINERS = {
    "plain.pt": lambda tower: tower,
    "module.pt": lambda tower: {"state_dict": prefixed("module.", tower), "optimizer": {"state": {}}, "epoch": 3},
    "compiled.bin": lambda tower: prefixed("_orig_mod.", tower),
    "compiled_within.pt": lambda tower: {k.replace(".conv1", "._orig_mod.conv1"): t for k, t in tower.items()},
    "both.pt": lambda tower: {"model": prefixed("module._orig_mod.", tower)},
    "model.pth": lambda tower: {"model": tower, "epoch": 3},
    "model_state_dict": lambda tower: {"model_state_dict": tower, "epoch": 3},
    "net.th": lambda tower: {"net": tower},
    "model_best.pth.tar": lambda tower: {"state_dict": tower, "best_acc1": 0.5},
    "lightning.ckpt": lambda tower: {"state_dict": prefixed("model.", tower), "hyper_parameters": {"lr": 1e-3}},
    "any_name.pt": lambda tower: {"state_dict": prefixed("learner.my_encoder.", tower)},
    "nested.pt": lambda tower: {"model": {"state_dict": tower}},
    "arguments.pth": lambda tower: {"model": tower, "args": argparse.Namespace(lr=1e-3)},
    "more.pt": lambda tower: {**prefixed("module.", tower), "module.logit_scale": torch.zeros(())},
}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_checkpoints_as_trainers_write_them(tmp_path, tower, name, legacy):
    """By content: neither the file's suffix nor what was put in front of the names matters."""
    model, theirs = tower
    torch.save(TRAINERS[name](theirs), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    loaded = load_backbone(VisionTransformer("tiny"), tmp_path / name)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_shards_named_by_an_index_and_half_precision(tmp_path, tower, kind):
    model, theirs = tower
    half = {name: tensor.bfloat16() for name, tensor in theirs.items()}
    files = {f"model-{i}-of-2": dict(list(half.items())[i::2]) for i in range(2)}
    for file, part in files.items():
        (save_file if kind == "safetensors" else torch.save)(part, tmp_path / file)
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    loaded = load_backbone(VisionTransformer("tiny"), index).state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16().float()) for name, tensor in model.state_dict().items())
    (tmp_path / "model-1-of-2").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"lacks model-1-of-2, which index.json names"):
        read_state(index)
    index.write_text("{" + "[" * 10**5)
    with pytest.raises(UserError, match="no JSON that"):
        read_state(index)


@pytest.mark.parametrize("made", [torch.Tensor.to_sparse, lambda t: t.to("meta"), quantised])
def test_tensors_that_are_not_plain(tmp_path, tower, made):
    torch.save({name: made(tensor) for name, tensor in tower[1].items()}, tmp_path / "x")
    with pytest.raises(UserError, match=r"x holds \S+ without its values \(meta\), sparse or quantised: save it dense"):
        load_backbone(VisionTransformer("tiny"), tmp_path / "x")


@pytest.mark.parametrize("place", ["../secret", "{folder}/secret", "below/secret", "../model/model.safetensors"])
def test_an_index_leads_nowhere_else(tmp_path, tower, place):
    """Not even to a file that is there and holds weights; nor does a library follow a stranger's folder out of it."""
    (tmp_path / "model" / "below").mkdir(parents=True)
    for path in ("secret", "model/below/secret", "model/model.safetensors"):
        save_file(tower[1], tmp_path / path)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": place.format(folder=tmp_path)}}))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    for read in (
        lambda: read_state(index),
        lambda: load_source(f"hf:{tmp_path}/model"),
        lambda: load_classifier(f"hf:{tmp_path}/model", pretrained=True, prompts=(), device=torch.device("cpu")),
    ):
        with pytest.raises(UserError, match="which does not lie beside it: no file elsewhere is read"):
            read()


def test_of_two_towers_and_two_states(tmp_path, tower, capsys):
    _, theirs = tower
    with pytest.raises(UserError, match=r"several vision towers, under 'a.visual.', 'b.visual.': keep the tensors of"):
        load_backbone(VisionTransformer("tiny"), {**prefixed("a.", theirs), **prefixed("b.", theirs)})
    torch.save({"state_dict": theirs, "state_dict_ema": prefixed("x", theirs)}, tmp_path / "x.pt")
    load_backbone(VisionTransformer("tiny"), tmp_path / "x.pt")
    assert "holds state_dict, state_dict_ema: state_dict is read" in capsys.readouterr().err


class Trap:
    def __reduce__(self):
        return (print, ("this must not run",))


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def compressed(archive):
    """The same ZIP archive, deflated, as a small file that would unpack to anything."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither safetensors nor a pickled state dict, but something else"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS: fetch the file itself"),
        (b"<!DOCTYPE html><html>", "a web page: download the file itself"),
        (bytes(1000), "zeros: its download was not finished"),
        (b"\x80\x04garbage", "is damaged"),
        (b"PK\x03\x04garbage", "is damaged"),
        (b"\x80\x04" + b"(" * 10**5 + b"N.", "is damaged"),
        (saved({"weight": torch.zeros(1), "trap": Trap()}), "and would execute code when loaded"),
        (saved({"model": VisionTransformer("tiny")}), "and would execute code when loaded"),
        (compressed(saved({"weight": torch.zeros(10**6)})), r"would unpack to 4,00\d,\d+ bytes: save it again"),
        (b"{}", "no index of weights"),
    ],
    ids=["empty", "LFS", "web page", "zeros", "pickle", "zip", "deep", "trap", "whole model", "bomb", "JSON"],
)
def test_files_that_are_no_weights(tmp_path, capsys, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_state(tmp_path / "x.safetensors")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "no state dict but a list"), ({"epoch": 3, "lr": 0.1}, "no state dict but epoch, lr: save model.state_")],
)
def test_pickles_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        read_state(tmp_path / "x.pt")


def test_integer_weights_are_named(tower):
    _, theirs = tower
    with pytest.raises(UserError, match=r"patch_weight is torch.int8, it must be of a float dtype"):
        load_backbone(
            VisionTransformer("tiny"), {**theirs, "visual.conv1.weight": theirs["visual.conv1.weight"].char()}
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10**9}, "width must be at most 65536, got 1000000000"),
        ({"depth": 10**9}, "depth must be at most 1000, got 1000000000"),
        ({"width": 2**16, "depth": 1000}, "describes a model of 51,539,620,134,912 parameters and holds at most"),
        ({"width": "96"}, "width must be an int, got '96'"),
        ({"colour": 3}, "unexpected keyword argument 'colour'"),
        (None, "holds no JSON that can be read"),
    ],
)
def test_a_header_that_asks_for_more_than_there_is(tmp_path, changes, message):
    """Refused before anything of that size is built."""
    asked = "[" * 10**5 if changes is None else json.dumps({**dataclasses.asdict(preset("tiny")), **changes})
    save_file({"x": torch.zeros(8)}, tmp_path / "x.safetensors", {"architecture": asked})
    with pytest.raises(UserError, match=message):
        read_architecture(tmp_path / "x.safetensors")


def test_what_shows_in_no_tensor_is_compared_where_the_file_says_it(tmp_path):
    """The base of rotary positions is none of the weights; another image size is no other architecture."""
    config = preset("tiny", rotary=Rotary(100.0), pool="mean")
    model = VisionTransformer(config)
    save_tensors(tmp_path / "x.safetensors", model.state_dict(), architecture_metadata(config))
    message = r"another architecture: rotary is .*'theta': 100.0.*, not .*'theta': 10000.0.*make the model of"
    with pytest.raises(UserError, match=message):
        load_backbone(VisionTransformer(replace(config, rotary=Rotary())), tmp_path / "x.safetensors")
    loaded = load_backbone(VisionTransformer(replace(config, image_size=48)), tmp_path / "x.safetensors")
    assert torch.equal(loaded.patch_weight, model.patch_weight)


@pytest.mark.parametrize(("held", "wanted"), [(3, 0), (0, 3)])
def test_registers_of_weights_and_of_a_model_without(held, wanted):
    state = VisionTransformer(preset("tiny", registers=held)).state_dict()
    message = f"they have {held} registers, the model {wanted}: a registers={held} model takes them"
    with pytest.raises(UserError, match=message):
        load_backbone(VisionTransformer(preset("tiny", registers=wanted)), state)
