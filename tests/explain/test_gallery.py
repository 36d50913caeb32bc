"""The gallery command, with models of every library and random weights."""

import re
import sys

import numpy as np
import pytest
import torch
import zoo
from families import save, with_text
from PIL import Image

from maskcf_fast.core.errors import UserError
from maskcf_fast.data.images import read_image
from maskcf_fast.explain.__main__ import main
from maskcf_fast.explain.gallery import _explain, draw_gallery
from maskcf_fast.explain.models import explain
from maskcf_fast.models.libraries import Classifier

# The package shares its name with the function `maskcf_fast.explain`, so modules in it are found by import only.
gallery = sys.modules["maskcf_fast.explain.gallery"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "deeper"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, suffix in enumerate(["jpg", "png", "JPEG"]):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"image{i}.{suffix}")
    (folder / "notes.txt").write_text("no image")
    return folder.parent


def command(images, model, *options):
    out = images.parent / "out"
    code = main(["--model", model, "--images", str(images), "--out", str(out), "--device", "cpu", *options])
    return code, sorted(path.name for path in out.glob("*"))


PICTURES = ["0000-image0.png", "0001-image1.png", "0002-image2.png", "gallery.png"]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("timm:vit_tiny_patch16_224", ["--batch-size", "2", "--start-layer", "-1"]),
        ("torchvision:vit_b_32", ["--label", "7"]),
        ("open_clip:ViT-S-32-alt", ["--prompts", "a cat", "a dog"]),
    ],
)
def test_random_weights(images, model, options, capsys):
    code, files = command(images, model, "--no-pretrained", *options)
    assert (code, files) == (0, PICTURES)
    assert "3 images explained" in capsys.readouterr().out
    picture = np.asarray(Image.open(images.parent / "out" / "gallery.png").convert("RGB"))
    assert picture.shape[1] > 3 * picture.shape[0]  # three pairs in a row
    assert picture.std() > 30


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTForImageClassification", []),
        ("Dinov2ForImageClassification", ["--label", "2"]),
        ("CLIPModel", ["--prompts", "a cat", "a dog"]),
    ],
)
@pytest.mark.parametrize("pretrained", ["--pretrained", "--no-pretrained"])
def test_hugging_face_folder(images, tmp_path, name, options, pretrained):
    made = with_text("CLIP", tmp_path) if name == "CLIPModel" else save("hf", name, tmp_path, num_labels=5)
    assert command(images, made[0], *options, pretrained) == (0, PICTURES)


def test_what_is_drawn(images):
    """The picture that the model saw, undone normalisation, and the map that `explain` gives, as a grid."""
    model = zoo.make("timm-vit")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def transform(picture):
        pixels = torch.from_numpy(np.array(picture.resize((32, 32)))).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    loaded = Classifier(model, model, transform, mean, std, {3: "owl, bird"})
    path = images / "deeper" / "image1.png"

    class Config:
        label, start_layer = 3, 0

    image = transform(read_image(path))
    (picture,) = _explain(loaded, [(path, image)], Config, torch.device("cpu"))
    assert torch.allclose(
        picture.pixels, torch.from_numpy(np.array(Image.open(path).resize((32, 32)))) / 255, atol=1e-6
    )
    assert torch.equal(picture.heat.flatten(), explain(model, image[None], torch.tensor([3]))[0])
    assert picture.heat.shape == (4, 4)
    share = model(image[None]).softmax(1)[0, 3]
    assert picture.title == f"owl ({share:.0%})"


def test_sheet_has_every_picture(images, monkeypatch):
    saved = []
    monkeypatch.setattr(gallery, "_save", lambda p, path, columns: saved.append(len(p)))
    monkeypatch.setattr(gallery, "SHEET", 2)
    assert command(images, "timm:vit_tiny_patch16_224", "--no-pretrained")[0] == 0
    assert saved == [1, 1, 1, 2]


def test_unreadable_images_are_named_and_skipped(images, capsys):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    code, files = command(images, "timm:vit_tiny_patch16_224", "--no-pretrained")
    assert (code, files) == (0, PICTURES)
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "1 of 4 images could not be read" in error


def test_second_run_leaves_its_own_pictures_out(images):
    for path in ("image0.jpg", "image1.png"):
        (images / "deeper" / path).unlink()
    options = ["--no-pretrained", "--device", "cpu", "--images", str(images), "--out", str(images / "maps")]
    for _ in range(2):
        assert main(["--model", "timm:vit_tiny_patch16_224", *options]) == 0
        assert sorted(p.name for p in (images / "maps").iterdir()) == ["0000-image2.png", "gallery.png"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("tim:vit_tiny_patch16_224", [], "timm:MODEL.TAG.*did you mean 'timm'"),
        ("vit_tiny_patch16_224", [], "a classifier is named open_clip:MODEL"),
        ("timm:vit_tinny_patch16_224", [], "did you mean 'vit_tiny_patch16_224'"),
        ("torchvision:vit_b16", [], "did you mean 'vit_b_16'"),
        ("open_clip:ViT-B32", [], "did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/openaj", ["--pretrained"], "did you mean 'openai'"),
        ("open_clip:ViT-B-32", [], "has no classes: give --prompts"),
        ("timm:vit_tiny_patch16_224", ["--prompts", "a cat"], "--prompts are for CLIP-like models"),
        ("timm:vit_tiny_patch16_224", ["--label", "1000"], "labels must lie in"),
        ("timm:vit_tiny_patch16_224", ["--label", "99999999999999999999"], "--label must be the number of a class"),
        ("timm:vit_tiny_patch16_224", ["--start-layer", "12"], "start_layer must be an int in"),
        ("timm:vit_tiny_patch16_224", ["--batch-size", "0"], "batch-size must be at least 1"),
        ("timm:resnet18", [], "no attention call was recorded"),
    ],
)
def test_mistakes_are_one_message(images, capsys, model, options, message):
    code, files = command(images, model, "--no-pretrained", *options)
    assert (code, files) == (1, [])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error, re.DOTALL)


def test_classifier_without_head_is_refused(images, tmp_path, capsys):
    assert command(images, with_text("CLIP", tmp_path)[0])[0] == 1
    assert "no image classifier. For a CLIP-like model, give --prompts" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{}, {"a.jpg": b"junk"}], ids=["none", "broken"])
def test_folder_without_images(tmp_path, capsys, content):
    (tmp_path / "images").mkdir()
    for name, data in content.items():
        (tmp_path / "images" / name).write_bytes(data)
    assert command(tmp_path / "images", "timm:vit_tiny_patch16_224", "--no-pretrained")[0] == 1
    assert "images in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("timm:resnet18", "A model that has none, such as a convolutional network, cannot be explained"),
        ("timm:swin_tiny_patch4_window7_224", "computes attention by an explicit softmax"),
        ("timm:cait_xxs24_224", "cross-attention leads to the score"),
        ("torchvision:resnet18", "A model that has none"),
        ("open_clip:convnext_base/laion400m_s13b_b51k", "A model that has none"),
        ("timm:vit_tiny_patch16_224", None),
        ("torchvision:vit_b_32", None),
        ("open_clip:ViT-B-32/openai", None),
    ],
)
def test_only_a_model_that_can_be_explained_is_downloaded(tmp_path, monkeypatch, caplog, model, said):
    pytest.importorskip(model.partition(":")[0])
    real = gallery.load_classifier

    def load(name, *, pretrained, **options):
        if pretrained:
            raise FileNotFoundError("the download")
        return real(name, pretrained=pretrained, **options)

    monkeypatch.setattr(gallery, "load_classifier", load)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    prompts = ("a cat", "a dog") if model.startswith("open_clip") else ()
    message = f"{model} cannot be explained: (?s:.*){said}" if said else "^the download$"
    with pytest.raises(UserError if said else FileNotFoundError, match=message):
        draw_gallery(gallery.GalleryConfig(model, tmp_path, tmp_path / "out", prompts=prompts))
    assert not said or not caplog.records


@pytest.mark.parametrize(("option", "turned"), [((), True), (("--exif",), True), (("--no-exif",), False)])
def test_images_are_turned_as_the_setting_says(tmp_path, monkeypatch, option, turned):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    seen = []
    monkeypatch.setattr(gallery, "read_image", lambda *arguments: seen.append(read_image(*arguments)) or seen[-1])
    arguments = ["--model", "torchvision:vit_b_32", "--no-pretrained", "--images", str(tmp_path), *option]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert [image.size for image in seen] == [(40, 60) if turned else (60, 40)]
