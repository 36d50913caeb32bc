"""Each published data set in miniature, with images whose answers are known."""

import json
import shutil
import sys

import pytest
from coloured import NUMBERS, SIZE, write, write_framed, write_objectnet, write_tree

from maskcf_fast.core.errors import UserError
from maskcf_fast.data import LoaderConfig, LoadingError, build_loader
from maskcf_fast.evaluation import Reader, Spec, read_benchmark
from maskcf_fast.evaluation.classes import numbered_classes
from maskcf_fast.evaluation.hugging_face import read_table
from maskcf_fast.evaluation.layouts import LAYOUTS, detect


def test_imagenet_by_wordnet_id(score, wnids, tmp_path):
    root = write_tree(tmp_path / "val", {wnids[0]: [0, 0, 7], wnids[999]: [999], wnids[281]: [281, 282]})
    benchmark, result = score(f"imagenet:{root}")
    assert result.images == 6
    assert result.top1 == pytest.approx(100 * 4 / 6)
    assert result.per_class == {wnids[0]: (3, 2), wnids[281]: (2, 1), wnids[999]: (1, 1)}
    assert not benchmark.restricted
    assert "6 images of 3 classes here, the complete imagenet 50,000 of 1,000" in benchmark.notes[0]


def test_v2_is_mapped_by_number(score, wnids, tmp_path):
    numbers = [0, 1, 2, 3, 10, 11, 100, 999]  # as strings, 10 and 100 come before 2
    root = write_tree(tmp_path / "v2", {str(n): [n, n] for n in numbers})
    benchmark, result = score(f"imagenet-v2:{root}")
    assert benchmark.source.classes == ("0", "1", "10", "100", "11", "2", "3", "999")
    assert result.top1 == 100
    # A model of a few classes knows them by name: class number 999 is its fourth output, 10 its second.
    few = (wnids[2], wnids[10], wnids[11], wnids[999])
    root = write_tree(tmp_path / "few", {"999": [3, 3, 0], "10": [1], "2": [0], "11": [2], "500": [1]})
    _, result = score(f"imagenet-v2:{root}", classes=few, outside="skip")
    assert result.per_class == {"10": (1, 1), "11": (1, 1), "2": (1, 1), "999": (3, 2)}


def test_v2_needs_no_list_for_a_model_of_imagenet(wnids, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert numbered_classes(wnids) == wnids
    for others in (wnids[:999], wnids[::-1], ("cat", "dog")):
        with pytest.raises(ImportError, match="pip install timm, or pass --classes FILE"):
            numbered_classes(others)


@pytest.mark.parametrize("layout", ["imagenet-r", "imagenet-a"])
def test_r_and_a_choose_among_their_classes(score, wnids, tmp_path, layout):
    inside = [6, 11, 13, 29, 50, 99, 107]
    seconds = (inside[0], inside[1])
    answers = {wnids[n]: [n] for n in inside}
    # Where the best answer lies outside the subset, the second is taken: here a right and a wrong one.
    answers[wnids[inside[0]]] = [(700, 1), (700, 2), (inside[1], 1)]
    root = write_tree(tmp_path / "data", answers)
    benchmark, result = score(f"{layout}:{root}", seconds=seconds)
    assert benchmark.allowed.nonzero()[:, 0].tolist() == inside
    assert result.per_class[wnids[inside[0]]] == (3, 1)
    assert result.top1 == pytest.approx(100 * 7 / 9)
    assert result.top5 is not None
    # All 1000 classes to choose from: only the plain ones are right.
    for everything in ("imagenet-sketch", "folder"):
        benchmark, result = score(f"{everything}:{root}", seconds=seconds)
        assert not benchmark.restricted
        assert result.top1 == pytest.approx(100 * 6 / 9)


def test_objectnet_has_several_right_classes_and_a_border(score, tmp_path, wnids):
    root = write_objectnet(tmp_path / "objectnet-1.0")
    benchmark, result = score(f"objectnet:{root}")
    assert result.per_class == {"alarm_clock": (4, 2), "backpack": (1, 1), "drill": (1, 1)}
    assert benchmark.allowed.nonzero()[:, 0].tolist() == [409, 414, 530, 740]
    assert benchmark.border == 2
    assert benchmark.notes[0].startswith("1 of 4 classes of objectnet are not ImageNet's")
    assert result.top5 is None  # four classes to choose from
    assert score(f"objectnet:{root / 'images'}")[1] == result
    # A model that lacks one of two right classes; and both.
    few = tuple(name for name in wnids if name not in (wnids[409], wnids[740]))
    with pytest.raises(ValueError, match=r"1 of 4 classes of objectnet .* are not among the model's 998: 'drill'"):
        score(f"objectnet:{root}", classes=few)
    assert set(score(f"objectnet:{root}", classes=few, outside="skip")[1].per_class) == {"alarm_clock", "backpack"}


def test_border_of_objectnet_only(score, tmp_path, wnids):
    """The frame, read as a colour, is class 31: what is seen if it is not cut off."""
    write_framed(tmp_path / "val" / wnids[31] / "0.png", 5, 5)
    assert score(f"imagenet:{tmp_path / 'val'}")[1].top1 == 100


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("imagenet_to_label_2012_v2", None, "lacks imagenet_to_label_2012_v2"),
        ("objectnet_to_imagenet_1k.json", "{", "holds no JSON that can be read"),
        ("objectnet_to_imagenet_1k.json", "[]", "is not dict.* extract it"),
        ("objectnet_to_imagenet_1k.json", '{"Drill": "drill press"}', "0 ImageNet classes are called 'drill press'"),
        ("folder_to_objectnet_label.json", "{}", "'air_freshener' of ObjectNet is not in"),
        ("pytorch_to_imagenet_2012_id.json", '{"0": 1000}', "class 0 is said to be in line 1000 of 1000"),
        ("pytorch_to_imagenet_2012_id.json", '{"zero": 0}', "class zero is said to be in line 0 of 1000"),
        ("imagenet_to_label_2012_v2", "class\n" * 1000, "0 ImageNet classes are called 'analog clock'"),
        ("imagenet_to_label_2012_v2", "\n".join(sorted(NUMBERS) * 250), "250 ImageNet classes are called 'analog cl"),
    ],
)
def test_damaged_objectnet(score, tmp_path, file, content, words):
    root = write_objectnet(tmp_path / "objectnet")
    path = root / "mappings" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        score(f"objectnet:{root}")


def test_classes_outside_the_models(score, wnids, tmp_path):
    root = write_tree(tmp_path / "r", {wnids[4]: [4], "n99999999": [4], wnids[8]: [8]})
    with pytest.raises(
        ValueError, match=r"1 of 3 classes of imagenet-r .* are not among the model's 1000: 'n99999999'"
    ):
        score(f"imagenet-r:{root}")
    benchmark, result = score(f"imagenet-r:{root}", outside="skip")
    assert (result.images, result.top1) == (2, 100)
    assert benchmark.allowed.sum() == 2
    assert "their images are left out" in benchmark.notes[0]
    with pytest.raises(ValueError, match=r"no image .* is of a class that the model knows"):
        score(f"imagenet-r:{root}", classes=("cat", "dog"), outside="skip")


def test_any_folder_and_translated_names(score, tmp_path):
    classes = ("cat", "dog", "owl")
    # "dog" where there are no dogs: only by the subset is the second best taken, which is "cat".
    root = write_tree(tmp_path / "mine", {"cat": [0, (1, 1)], "owl": [2, (1, 1)]})
    assert score(f"folder:{root}", classes=classes, seconds=(0,))[1].top1 == 50
    benchmark, result = score(f"subset:{root}", classes=classes, seconds=(0,))
    assert benchmark.restricted
    assert result.per_class == {"cat": (2, 2), "owl": (2, 1)}
    root = write_tree(tmp_path / "other", {"pets": [0, 1, 2], "owl": [2]})
    with pytest.raises(ValueError, match="'pets'; --outside skip"):
        score(f"folder:{root}", classes=classes)
    _, result = score(f"folder:{root}", classes=classes, class_map={"pets": ("cat", "dog")})
    assert result.per_class == {"pets": (3, 2), "owl": (1, 1)}


def test_a_missing_library_is_named_with_the_data_set_that_needs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=f"pip install datasets, or .*: {tmp_path} is a Hugging Face data set"):
        read_table(tmp_path)


@pytest.fixture
def hugging_face(tmp_path):
    """A function that saves a data set of images by their files and labels."""
    datasets = pytest.importorskip("datasets")

    def save(path, answers, names=("cat", "dog", "owl"), **columns):
        files = []
        for i, (best, _) in enumerate(answers):
            files.append(str(tmp_path / "files" / f"{i}.png"))
            write(tmp_path / "files" / f"{i}.png", best)
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
        content = {"image": files, "label": [label for _, label in answers]}
        table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
        for name, values in columns.items():
            table = table.add_column(name, values)
        table.save_to_disk(str(path))
        return path

    return save


def test_hugging_face(score, hugging_face, tmp_path):
    # The names are in another order than the model's.
    answers = [(0, 1), (0, 1), (1, 0), (2, 2), (1, 2)]
    root = hugging_face(tmp_path / "hf", answers, names=("dog", "cat", "owl"), id=[1, 2, 3, 4, 5])
    benchmark, result = score(str(root), classes=("cat", "dog", "owl"))
    assert benchmark.layout == "hf"
    assert result.per_class == {"dog": (1, 1), "cat": (2, 2), "owl": (2, 1)}
    benchmark, result = score(f"hf:{root}", classes=("cat", "dog"), outside="skip")
    assert (result.images, result.top1) == (3, 100)
    with pytest.raises(ValueError, match="'owl'"):
        score(f"hf:{root}", classes=("cat", "dog"))


def test_a_broken_row_of_hugging_face_is_named_or_skipped(score, hugging_face, tmp_path):
    classes = ("cat", "dog", "owl")
    (tmp_path / "files").mkdir()
    root = hugging_face(tmp_path / "hf", [(0, 0), (1, 1), (2, 2)])
    datasets = pytest.importorskip("datasets")
    broken = [{"bytes": (tmp_path / "files" / "0.png").read_bytes(), "path": None}, {"bytes": b"\x89PNG", "path": None}]
    features = datasets.load_from_disk(str(root)).features
    datasets.Dataset.from_dict({"image": [*broken, None], "label": [0, 1, 2]}, features=features).save_to_disk(
        str(tmp_path / "broken")
    )
    with pytest.raises(ValueError, match=r"2 file\(s\) .*\n  row 1: not an image .*\n  row 2: holds no image"):
        score(f"hf:{tmp_path / 'broken'}", classes=classes)
    benchmark, result = score(f"hf:{tmp_path / 'broken'}", classes=classes, on_bad_image="skip")
    assert (result.images, result.top1) == (1, 100)
    assert benchmark.notes == ("2 files of broken are no usable images and left out.",)


def test_which_column_of_labels_is_meant(score, tmp_path):
    datasets = pytest.importorskip("datasets")
    for i in range(2):
        write(tmp_path / f"{i}.png", i)
    content = {
        "image": [str(tmp_path / f"{i}.png") for i in range(2)],
        "kind": [0, 0],
        "animal": [1, 0],
        "breed": ["b", "a"],
    }
    features = {
        "image": datasets.Image(), "kind": datasets.ClassLabel(names=["pet"]),
        "animal": datasets.ClassLabel(names=["dog", "cat"]), "breed": datasets.Value("string"),
    }  # fmt: skip
    table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    table.save_to_disk(str(tmp_path / "two"))
    assert score(f"hf:{tmp_path / 'two'}", classes=("cat", "dog"))[1].top1 == 100  # by the names
    with pytest.raises(ValueError, match=r"kind \(ClassLabel\).*two#COLUMN chooses the labels"):
        score(f"hf:{tmp_path / 'two'}", classes=("x", "y"))
    assert score(f"{tmp_path / 'two'}#breed", classes=("b", "a"))[1].per_class == {"b": (1, 1), "a": (1, 1)}
    table.remove_columns(["kind", "animal"]).rename_column("breed", "label").save_to_disk(str(tmp_path / "texts"))
    assert score(f"hf:{tmp_path / 'texts'}", classes=("b", "a"))[1].top1 == 100  # plain text


def test_hugging_face_that_does_not_fit(score, hugging_face, tmp_path):
    datasets = pytest.importorskip("datasets")
    classes = ("cat", "dog", "owl")
    root = hugging_face(tmp_path / "unlabelled", [(0, 0), (1, -1)])
    with pytest.raises(ValueError, match=r"1 images of .* have no label, first in row 1"):
        score(f"hf:{root}", classes=classes)
    whole = datasets.DatasetDict({"test": datasets.load_from_disk(str(hugging_face(tmp_path / "one", [(0, 0)])))})
    whole.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"holds the splits test: pass the folder of one, such as .*splits/test"):
        score(str(tmp_path / "splits"), classes=classes)
    assert score(str(tmp_path / "splits" / "test"), classes=classes)[1].top1 == 100
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match=r"one column of images and one of class labels, its columns are a \(Value\)"):
        score(f"hf:{tmp_path / 'numbers'}", classes=classes)
    with pytest.raises(ValueError, match=r"not laid out as hf: expected state.json.*found '0.png'"):
        score(f"hf:{tmp_path / 'files'}", classes=classes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "imagenet-r:{numbers}",
            "expected class folders called by WordNet id.*found folders '0'.*classes of imagenet-v2",
        ),
        ("imagenet-v2:{wnids}", "expected class folders called by number.*these are the classes of imagenet or"),
        ("imagenet-a:{above}", "did you mean .*above/imagenet-a"),
        ("imagenet:{bare}", "found no folders"),
        ("folder:{bare}", "has no class folders"),
        ("objectnet:{wnids}", "expected the folders images .* and mappings, found classes 'n0"),
        ("imagenet:/absent", "no data set folder /absent"),
        ("imagenet:{file}", "is a file"),
        ("imagnet-v2:{numbers}", "unknown layout 'imagnet-v2' .*did you mean 'imagenet-v2'"),
        ("", "not of the form"),
    ],
)
def test_wrong_layouts(score, wnids, tmp_path, text, words):
    write_tree(tmp_path / "numbers", {"0": [0], "12": [12]})
    write_tree(tmp_path / "wnids", {wnids[0]: [0]})
    write_tree(tmp_path / "above" / "imagenet-a", {wnids[0]: [0]})
    (tmp_path / "bare").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError), match=words):
        score(text.format(**{path.name: path for path in tmp_path.iterdir()}))


def test_bad_images_are_named_or_left_out(score, wnids, tmp_path):
    root = write_tree(tmp_path / "val", {wnids[0]: [0, 0]})
    (root / wnids[0] / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        score(f"imagenet:{root}")
    benchmark, result = score(f"imagenet:{root}", on_bad_image="skip")
    assert (result.images, result.top1) == (2, 100)
    assert "1 files of imagenet are no usable images" in benchmark.notes[0]


def test_bad_images_of_objectnet(score, tmp_path):
    """Of classes that ImageNet has; the others' are not looked at."""
    root = write_objectnet(tmp_path / "objectnet")
    before = score(f"objectnet:{root}")[1]
    (root / "images" / "air_freshener" / "0.png").write_bytes(b"no image")
    assert score(f"objectnet:{root}")[1] == before
    (root / "images" / "alarm_clock" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 file\(s\) below .*\n  alarm_clock/0\.png: not an image"):
        score(f"objectnet:{root}")
    benchmark, result = score(f"objectnet:{root}", on_bad_image="skip")
    assert result.per_class == {"alarm_clock": (3, 1), "backpack": (1, 1), "drill": (1, 1)}
    assert "1 files of objectnet are no usable images" in benchmark.notes[1]


@pytest.mark.parametrize("threads", [0, 1])
def test_broken_image_of_objectnet_is_named(tmp_path, wnids, threads):
    root = write_objectnet(tmp_path / "objectnet")
    (root / "images" / "drill" / "0.png").write_bytes(b"no image")
    benchmark = read_benchmark(Spec.parse(f"objectnet:{root}"), Reader(wnids, verify=False))
    config = LoaderConfig(batch_size=4, image_size=SIZE, train=False, threads=threads, border=benchmark.border)
    with pytest.raises(LoadingError, match=r"^/.*drill/0\.png: not an image"):
        list(build_loader(benchmark.source, config, "torch"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/imagenet-r", ("imagenet-r", None, "/data/imagenet-r")),
        ("imagenet-v2:/data/x", ("imagenet-v2", "imagenet-v2", "/data/x")),
        ("folder:/data/x", ("x", "folder", "/data/x")),
        ("mine=/data/x", ("mine", None, "/data/x")),
        ("objectnet=/data/x", ("objectnet", "objectnet", "/data/x")),
        ("V2 top=imagenet-v2:/data/x", ("V2 top", "imagenet-v2", "/data/x")),
        ("/data/a=b:c", ("a=b:c", None, "/data/a=b:c")),
    ],
)
def test_spec(text, expected):
    spec = Spec.parse(text)
    assert (spec.name, spec.layout, str(spec.path)) == expected


def test_layout_is_found_out(wnids, tmp_path):
    classes = tuple(wnids)
    for name in ("imagenet-r", "ImageNet-A", "sketch", "val"):
        write_tree(tmp_path / name, {wnids[0]: [0]})
    found = {path.name: detect(path, classes) for path in tmp_path.iterdir()}
    assert found == {
        "imagenet-r": "imagenet-r",
        "ImageNet-A": "imagenet-a",
        "sketch": "imagenet-sketch",
        "val": "folder",
    }
    (note,) = read_benchmark(Spec.parse(str(tmp_path / "val")), Reader(classes)).notes
    assert "has 1 classes, and predictions are chosen from all 1,000 of the model; subset:" in note
    assert read_benchmark(Spec.parse(f"folder:{tmp_path / 'val'}"), Reader(classes)).notes == ()
    assert detect(write_tree(tmp_path / "v2", {"7": [7], "10": [10]}), classes) == "imagenet-v2"
    assert detect(tmp_path / "v2", ("10", "7")) == "folder"  # the model's own classes are called so
    assert detect(write_objectnet(tmp_path / "o"), classes) == "objectnet"
    assert detect(tmp_path / "o" / "images", classes) == "objectnet"


def test_fingerprint_tells_data_sets_apart(wnids, tmp_path):
    def fingerprint(text, classes=wnids):
        return read_benchmark(Spec.parse(text), Reader(classes)).fingerprint

    one = write_tree(tmp_path / "one", {wnids[0]: [0], wnids[5]: [5]})
    before = fingerprint(f"imagenet:{one}")
    assert before == fingerprint(f"other=imagenet-sketch:{one}")  # the same question under another name
    other = tmp_path / "other"
    shutil.copytree(one, other)
    write(one / wnids[0] / "0.png", 9)
    prints = {
        before,
        fingerprint(f"imagenet:{other}"),
        fingerprint(f"imagenet:{one}"),
        fingerprint(f"imagenet-r:{one}"),
        fingerprint(f"imagenet-r:{one}", wnids[:10]),
    }
    assert len(prints) == 5


def test_published_sizes():
    """Classes and images as the data sets' papers and archives have them."""
    assert {name: layout.complete for name, layout in LAYOUTS.items() if layout.complete} == {
        "imagenet": (1000, 50000),
        "imagenet-v2": (1000, 10000),
        "imagenet-r": (200, 30000),
        "imagenet-a": (200, 7500),
        "imagenet-sketch": (1000, 50889),
        "objectnet": (113, 18574),
    }


@pytest.mark.parametrize("damage", ["no rows", "state", "files elsewhere", "arrow"])
def test_a_hugging_face_folder_that_cannot_be_opened(tmp_path, damage):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [], "label": []} if damage == "no rows" else {"image": [None], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    if damage == "state":
        (tmp_path / "set" / "state.json").write_text("{}")
    elif damage == "files elsewhere":
        (tmp_path / "secret").write_text("secret" * 99)
        state = json.loads((tmp_path / "set" / "state.json").read_text())
        state["_data_files"] = [{"filename": "../secret"}]
        (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    elif damage == "arrow":
        [file] = (tmp_path / "set").glob("*.arrow")
        file.write_bytes(b"junk" * 99)
    with pytest.raises(UserError, match=r"datasets cannot open .*set: |no usable image is left|no images"):
        read_benchmark(Spec.parse(f"hf:{tmp_path / 'set'}"), Reader(("cat", "dog")))
