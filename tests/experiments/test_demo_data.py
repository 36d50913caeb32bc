"""The demo data set: reproducible, complete or absent, and with exactly the spurious cue it claims."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskcf_fast.experiments.demo_data import MARKER, SPLITS, TINTS, DemoData, DemoSpec, build_demo_data

SMALL = DemoSpec(counts=(60, 60, 60, 40, 40), sources=(40, 30, 30))


def images_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("digit_*/*.jpg"))


def sources_of(folder: Path) -> set[str]:
    return {path.stem.split("_source")[1] for path in images_of(folder)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return build_demo_data(tmp_path_factory.mktemp("demo") / "small", spec=SMALL)


def test_two_builds_are_byte_identical(small: DemoData, tmp_path: Path) -> None:
    again = build_demo_data(tmp_path / "again", spec=SMALL)
    assert again.checksum == small.checksum
    for split in SPLITS:
        ours, theirs = images_of(small.root / split), images_of(again.root / split)
        assert [p.name for p in ours] == [p.name for p in theirs]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))


def test_another_seed_gives_another_data_set(small: DemoData, tmp_path: Path) -> None:
    spec = DemoSpec(**{**SMALL.__dict__, "seed": 1})
    assert build_demo_data(tmp_path / "other", spec=spec).checksum != small.checksum


def test_layout(small: DemoData) -> None:
    for split, count in zip(SPLITS, SMALL.counts, strict=True):
        folder = small.root / split
        assert sorted(p.name for p in folder.iterdir()) == [f"digit_{c}" for c in range(10)]
        assert len(images_of(folder)) == count
    with Image.open(images_of(small.root / "train")[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SMALL.image_size,) * 2)
    assert [p.name for p in small.root.parent.iterdir()] == ["small"]  # no temporary folder is left


def test_splits_share_digits_only_where_they_are_compared(small: DemoData) -> None:
    pretrain, train, no_cue, id_test, ood_test = (sources_of(small.root / split) for split in SPLITS)
    assert not pretrain & train
    assert not (pretrain | train) & (id_test | ood_test)
    assert (train, id_test) == (no_cue, ood_test)
    assert [len(s) for s in (pretrain, train, id_test)] == list(SMALL.sources)


def test_tint_card_and_ink(tmp_path: Path) -> None:
    """The tint tells the class where it should, never on the card, and black digits come after pre-training.

    Nothing but tint, whole digits and no noise: all can be read off the decoded pixels.
    """
    spec = DemoSpec(counts=(300,) * 5, tint=1, contrast=(1, 1), noise=0)
    data = build_demo_data(tmp_path / "tinted", spec=spec)
    colours = TINTS / np.linalg.norm(TINTS, axis=1, keepdims=True)
    grid, side = spec.image_size // spec.step, spec.card // spec.step
    for split in SPLITS:
        paths = images_of(data.root / split)
        pixels = np.stack([np.asarray(Image.open(path), dtype=float) for path in paths])
        colour = pixels.max(axis=3) - pixels.min(axis=3)
        grey = colour.reshape(-1, grid, spec.step, grid, spec.step).max(axis=(2, 4)) < 20  # whole patches
        assert (grey.sum(axis=(1, 2)) == side**2).all()
        corners = [np.argwhere(each)[0] for each in grey]
        assert all(each[r : r + side, c : c + side].all() for each, (r, c) in zip(grey, corners, strict=True))
        assert len({tuple(corner) for corner in corners}) == (grid - side + 1) ** 2

        labels = np.array([int(path.parent.name.removeprefix("digit_")) for path in paths])
        told = np.mean(np.argmax(pixels.mean(axis=(1, 2)) @ colours.T, axis=1) == labels)
        expected = 0.98 if split in ("train", "id_test") else 0.1
        assert abs(told - expected) < 4 * np.sqrt(expected * (1 - expected) / len(paths)) + 0.01, split

        black, white = (pixels.max(axis=3) < 30).any(axis=(1, 2)), (pixels.min(axis=3) > 225).any(axis=(1, 2))
        assert (black != white).all()
        assert black.sum() == 0 if split == "pretrain" else 115 < black.sum() < 185


def test_a_finished_data_set_is_reused(tmp_path: Path) -> None:
    first = build_demo_data(tmp_path / "d", spec=SMALL)
    stamps = {p: p.stat().st_mtime_ns for p in first.root.rglob("*")}
    second = build_demo_data(tmp_path / "d", spec=SMALL)
    assert second == first
    assert stamps == {p: p.stat().st_mtime_ns for p in second.root.rglob("*")}


@pytest.mark.parametrize(
    "damage", ["another spec", "no marker", "cut marker", "image missing", "image changed", "image added"]
)
def test_another_incomplete_or_tampered_data_set_is_built_again(damage: str, tmp_path: Path, small: DemoData) -> None:
    other = DemoSpec(**{**SMALL.__dict__, "counts": (20,) * 5})
    data = build_demo_data(tmp_path / "d", spec=other if damage == "another spec" else SMALL)
    marker, image = data.root / MARKER, images_of(data.root / "train")[0]
    if damage == "no marker":
        marker.unlink()
        for path in images_of(data.root / "ood_test"):
            path.unlink()
    elif damage == "cut marker":
        marker.write_text(marker.read_text()[:20])
    elif damage == "image missing":
        image.unlink()
    elif damage == "image changed":
        content = bytearray(image.read_bytes())
        content[-10] ^= 1
        image.write_bytes(content)
    elif damage == "image added":
        (image.parent / "extra.jpg").write_bytes(image.read_bytes())
    assert build_demo_data(tmp_path / "d", spec=SMALL).checksum == small.checksum
    assert [len(images_of(data.root / split)) for split in SPLITS] == list(SMALL.counts)
    assert json.loads(marker.read_text())["checksum"] == small.checksum


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskcf_fast.experiments.demo_data._checksum", stop)
    with pytest.raises(KeyboardInterrupt):
        build_demo_data(tmp_path / "d", spec=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not a demo data set.*thesis\.tex"):
        build_demo_data(tmp_path, spec=SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"card": 64}, "card=64"),
        ({"card": 20}, "multiple of step=8"),
        ({"bias": 1.2}, r"bias must lie in \[0, 1\], got 1.2"),
        ({"counts": (0, 1, 1, 1, 1)}, "counts and sources must be positive"),
    ],
)
def test_a_wrong_spec_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSpec(**wrong)


def test_more_digits_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1797"):
        build_demo_data(tmp_path / "d", spec=DemoSpec(sources=(1000, 500, 500)))
