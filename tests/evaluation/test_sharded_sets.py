"""Test sets in tar shards give what the same images in folders give."""

import pytest
from coloured import write, write_objectnet, write_shards, write_tree

from maskcf_fast.evaluation import Reader, Spec, read_benchmark
from maskcf_fast.evaluation.layouts import detect

INSIDE = (0, 6, 11, 13, 29, 107)


@pytest.mark.parametrize("layout", ["imagenet", "imagenet-sketch", "imagenet-r", "imagenet-a", "folder", "subset"])
@pytest.mark.parametrize("named", ["in the samples", "in classes.txt"])
def test_wordnet_ids(score, wnids, tmp_path, layout, named):
    """Where the best answer, 700, lies outside a subset, the second is taken, here 6."""
    answers = {wnids[n]: [n, (700, 1), 999 if n == 13 else n] for n in INSIDE}
    tree = write_tree(tmp_path / "tree", answers)
    number = {name: str(i) for i, name in enumerate(wnids)}
    pattern = write_shards(tmp_path / "shards", tree, number.get if named == "in classes.txt" else str)
    if named == "in classes.txt":  # all of the model's classes, of which few have images
        (tmp_path / "shards" / "classes.txt").write_text("\n".join(wnids))
    expected, result = score(f"{layout}:{tree}", seconds=(6,))
    found, same = score(f"{layout}:{pattern}", seconds=(6,))
    assert same == result == score(f"{layout}:{tmp_path / 'shards'}", seconds=(6,))[1]
    restricted = layout in ("imagenet-r", "imagenet-a", "subset")
    assert result.top1 == pytest.approx(100 * (12 if restricted else 11) / 18)
    assert found.allowed.equal(expected.allowed)
    assert (found.num_classes, found.restricted, len(found.notes)) == (6, restricted, len(expected.notes))


@pytest.mark.parametrize("layout", ["imagenet-v2:", ""])
def test_numbers_without_names(score, tmp_path, layout):
    tree = write_tree(tmp_path / "tree", {"10": [10], "2": [2, 10], "999": [999]})
    pattern = write_shards(tmp_path / "v2", tree)
    benchmark, result = score(f"{layout}{pattern}")
    assert benchmark.layout == "imagenet-v2"
    assert result.per_class == {"10": (1, 1), "2": (2, 1), "999": (1, 1)}
    assert result == score(f"{layout}{tree}")[1]


def test_objectnet_with_its_border(score, tmp_path):
    expected, result = score(f"objectnet:{write_objectnet(tmp_path / 'folders')}")
    root = write_objectnet(tmp_path / "shards")
    (root / "images").rename(tmp_path / "tree")
    pattern = write_shards(root / "images", tmp_path / "tree")
    for path in (root, root / "images", pattern):
        benchmark, same = score(f"objectnet:{path}")
        assert same == result
        assert (benchmark.layout, benchmark.border, len(benchmark.notes)) == ("objectnet", 2, len(expected.notes))
        assert benchmark.allowed.equal(expected.allowed)
        assert detect(Spec.parse(str(path)).path, ()) == "objectnet"
    assert result.per_class == {"alarm_clock": (4, 2), "backpack": (1, 1), "drill": (1, 1)}


def test_class_map_and_outside(score, tmp_path):
    tree = write_tree(tmp_path / "tree", {"Katze": [0, (1, 1)], "owl": [2], "fox": [1]})
    classes = ("cat", "dog", "owl")
    pattern = write_shards(tmp_path / "shards", tree)
    with pytest.raises(ValueError, match=r"2 of 3 classes of shards .* not among the model's 3: 'Katze', 'fox'"):
        score(pattern, classes=classes)
    options = {"classes": classes, "class_map": {"Katze": ("cat",)}, "outside": "skip", "seconds": (2,)}
    benchmark, result = score(f"subset:{pattern}", **options)
    assert result.per_class == {"Katze": (2, 1), "owl": (1, 1)}
    assert "1 of 3 classes of shards" in benchmark.notes[0]
    assert result == score(f"subset:{tree}", **options)[1]


def test_layout_and_name_are_found_out(wnids, tmp_path):
    tree = write_tree(tmp_path / "tree", {wnids[0]: [0], wnids[5]: [5]})
    for name, layout in {"imagenet-r": "imagenet-r", "ImageNet-A": "imagenet-a", "val": "folder"}.items():
        pattern = write_shards(tmp_path / name, tree)
        for path in (pattern, str(tmp_path / name), f"{tmp_path / name}/0.tar"):
            spec = Spec.parse(path)
            assert (spec.name, spec.layout) == (name, None)
            assert detect(spec.path, wnids) == layout
    assert Spec.parse("imagenet-v2:/data/x/{00..09}.tar").name == "imagenet-v2"


def test_fingerprint_follows_the_shards(wnids, tmp_path):
    def fingerprint():
        return read_benchmark(Spec.parse(f"imagenet:{tmp_path / 'shards'}"), Reader(wnids)).fingerprint

    tree = write_tree(tmp_path / "tree", {wnids[0]: [0, 0], wnids[5]: [5, 5]})
    write_shards(tmp_path / "shards", tree)
    before = fingerprint()
    assert fingerprint() == before
    write(tree / wnids[5] / "1.png", 9)  # other pixels under the same name
    write_shards(tmp_path / "shards", tree)
    assert fingerprint() != before


def test_mistakes(score, wnids, tmp_path):
    tree = write_tree(tmp_path / "tree", {wnids[0]: [0], wnids[5]: [5]})
    pattern = write_shards(tmp_path / "numbers", tree, {wnids[0]: "0", wnids[5]: "5"}.get)
    for text, words in (
        (
            f"imagenet-r:{pattern}",
            "not laid out as imagenet-r: .* found tar shards of the classes '0', '5'; these are the classes of "
            r"imagenet-v2; .*numbers/classes\.txt names the classes of tar shards, one per line",
        ),
        (f"imagenet-v2:{write_shards(tmp_path / 'names', tree)}", "expected class folders called by number"),
        (
            f"imagenet:{tmp_path}/numbers/{{0..3}}.tar",
            r"2 of 4 tar shard\(s\) are missing or no files, first .*/2\.tar",
        ),
        (f"imagenet:{tmp_path}/absent/0.tar", r"1 of 1 tar shard\(s\) are missing"),
        (f"objectnet:{pattern}", "not laid out as objectnet: .* found classes '0', '5'"),
        (f"hf:{pattern}", r"not laid out as hf: .* found '0\.tar', '1\.tar'"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            score(text)
    whole = (tmp_path / "names" / "0.tar").read_bytes()
    (tmp_path / "names" / "0.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"0\.tar"):
        score(f"imagenet:{tmp_path / 'names'}")
