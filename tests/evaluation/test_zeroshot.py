"""Zero-shot heads are open_clip's own classifier, and know their classes."""

import json
from dataclasses import replace

import pytest
import torch
from families import assert_same, pixels, save
from safetensors import safe_open
from safetensors.torch import load_file

from maskcf_fast.evaluation.zeroshot import read_names, read_templates
from maskcf_fast.training.build import build_model
from maskcf_fast.training.settings import ModelConfig
from maskcf_fast.training.trainer import Trainer
from maskcf_fast.zeroshot import main

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP with random weights, as a local folder that open_clip reads."""
    folder = tmp_path_factory.mktemp("clip")
    save("open_clip", "VisionTransformer", folder, quick_gelu=True)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return open_clip.create_model(f"local-dir:{folder}").eval()


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("templates", ["openai", "simple", "file"])
def test_the_head_is_open_clips_zero_shot_classifier(folder, clip, tmp_path, templates):
    (tmp_path / "classes.txt").write_text("n01\tgreat tit\n\ngolden_retriever\nzebra\n")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\nthe {} at night\n")
    source = str(tmp_path / "prompts.txt") if templates == "file" else templates
    out = tmp_path / "head.safetensors"
    arguments = ["--model", f"open_clip:local-dir:{folder}", "--classes", str(tmp_path / "classes.txt")]
    assert main([*arguments, "--templates", source, "--out", str(out), "--batch-size", "2", "--device", "cpu"]) == 0

    theirs = {
        "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        "file": ["a photo of a {}.", "the {} at night"],
    }[templates]
    with torch.no_grad():
        directions = open_clip.build_zero_shot_classifier(
            clip, open_clip.get_tokenizer("ViT-B-32"), ["great tit", "golden retriever", "zebra"], theirs
        )
        images, normalised = pixels()
        expected = clip.logit_scale.exp() * clip.encode_image(normalised, normalize=True) @ directions
    config = ModelConfig(name=f"open_clip:local-dir:{folder}", head=out)
    model = build_model(config, 3, seed=0, classes=["n01", "golden_retriever", "zebra"])
    assert_same(model(images), expected)
    assert json.loads(metadata(out)["classes"]) == ["n01", "golden_retriever", "zebra"]


def test_a_model_without_a_text_tower(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.Dinov2Config().save_pretrained(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    arguments = ["--model", f"hf:{tmp_path}", "--classes", str(tmp_path / "classes.txt")]
    assert main([*arguments, "--out", str(tmp_path / "head.safetensors")]) == 1
    assert "of the kind dinov2, which has no text tower" in capsys.readouterr().err


def test_imagenet_in_the_order_of_its_folders(capsys):
    pytest.importorskip("timm")
    folders, names = read_names("imagenet")
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert "n03773504 and n04008634 are both called 'missile'" in capsys.readouterr().err
    assert len(folders) == len(names) == 1000
    assert folders == sorted(folders)
    assert dict(zip(folders, names, strict=True))["n02099601"] == "Golden Retriever"
    assert (folders[0], names[0]) == ("n01440764", "tench")


def test_wordnet_ids_are_called_by_their_names(tmp_path):
    """In ImageNet's list, beyond it, and told otherwise."""
    for name in ("n01440764", "n02084071", "zebra"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert read_names(str(tmp_path / "train"))[1] == ["tench", "dog", "zebra"]
    (tmp_path / "ids.txt").write_text("n01440764\tbig fish\nn02102040\n")
    assert read_names(str(tmp_path / "ids.txt"))[1] == ["big fish", "English Springer Spaniel"]
    (tmp_path / "ids.txt").write_text("n01440764\nn99999999\n")
    with pytest.raises(ValueError, match=r"what the WordNet ids 'n99999999' stand for is not known"):
        read_names(str(tmp_path / "ids.txt"))


@pytest.mark.parametrize(
    "lines", ["great_tit\nzebra\ngreat tit", "a\tZebra\nb\tzebra", "caf\u00e9_1\ncafe\u0301  1"],
)  # fmt: skip
def test_two_classes_with_the_same_prompts(tmp_path, lines):
    (tmp_path / "names.txt").write_text(lines, encoding="utf-16")
    with pytest.raises(ValueError, match=r"have the same prompts.*after a tab what to call it"):
        read_names(str(tmp_path / "names.txt"))


def test_a_head_knows_its_folders_in_either_form_of_unicode(folder, tmp_path):
    (tmp_path / "train" / "cafe\u0301").mkdir(parents=True)  # as macOS writes it
    (tmp_path / "train" / "zebra").mkdir()
    head = tmp_path / "head.safetensors"
    source = f"open_clip:local-dir:{folder}"
    assert main(["--model", source, "--classes", str(tmp_path / "train"), "--templates", "simple", "--device", "cpu",
                 "--out", str(head)]) == 0  # fmt: skip
    assert json.loads(metadata(head)["prompts"]) == ["caf\u00e9", "zebra"]
    build_model(ModelConfig(name=source, head=head), 2, seed=0, classes=["caf\u00e9", "zebra"])


def test_a_head_of_other_classes_is_refused(folder, tmp_path, image_folders, config):
    """The fixture's training folders are compared with the head's names, in their order."""
    names = sorted(path.name for path in image_folders["train"].iterdir())
    head = tmp_path / "head.safetensors"
    model = ["--model", f"open_clip:local-dir:{folder}", "--templates", "simple", "--device", "cpu", "--out", str(head)]
    assert main([*model, "--classes", str(image_folders["train"])]) == 0
    settings = replace(config, model=ModelConfig(name=f"open_clip:local-dir:{folder}", head=head))
    trainer = Trainer(settings, quiet=True)
    assert torch.equal(trainer.method.student.head.weight, load_file(head)["weight"])

    swapped = [names[0], names[2], names[1]]
    (tmp_path / "swapped.txt").write_text("\n".join(swapped))
    assert main([*model, "--classes", str(tmp_path / "swapped.txt")]) == 0
    with pytest.raises(ValueError, match=f"other classes.*output 1 is {names[2]!r}, the folder {names[1]!r}"):
        Trainer(replace(settings, out=tmp_path / "other"), quiet=True)
    linear = replace(settings.model, head_kind="linear")
    with pytest.raises(ValueError, match=r"is a cosine one: pass --model.head-kind cosine"):
        build_model(linear, 3, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "timm:vit_base_patch16_224"}, "train with --model.head-kind linear"),
        ({"--model": "open_clip:ViT-B-23/openai"}, "did you mean 'ViT-B-32'"),
        ({"--classes": "/absent"}, "--classes /absent: neither a file nor a folder"),
        ({"--templates": "opnai"}, "--templates opnai: no such file"),
        ({"--out": "/absent/head.safetensors"}, "there is no folder /absent"),
        ({"--batch-size": "0"}, "--batch-size must be at least 1"),
    ],
)
def test_bad_settings(folder, tmp_path, capsys, changes, message):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    arguments = {
        "--model": f"open_clip:local-dir:{folder}",
        "--classes": str(tmp_path / "classes.txt"),
        "--out": str(tmp_path / "head.safetensors"),
        **changes,
    }
    assert main([part for pair in arguments.items() for part in pair]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "head.safetensors").exists()


def test_bad_files(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="names 'a' more than once"):
        read_names(str(path))
    for text in ("a photo", "{} and {}", "{name}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"must hold one \{\} for the class"):
            read_templates(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_templates(str(path))
    with pytest.raises(ValueError, match="holds no class names"):
        read_names(str(path))
