import os

import numpy as np
import pytest
from pictures import picture

from maskcf_fast.core.files import cache_dir
from maskcf_fast.data import ImageError, Manifest, scan_images, verify
from maskcf_fast.data.scan import find_pictures


@pytest.fixture
def verified(monkeypatch) -> list[str]:
    """The names of the files that are decoded."""
    calls: list[str] = []
    original = verify._defect

    def spy(reader, index: int) -> str:
        calls.append(os.path.basename(reader.name(index)))
        return original(reader, index)

    monkeypatch.setattr(verify, "_defect", spy)
    return calls


def test_lists_classes_and_nested_files_in_order_without_hidden_ones(make_folder):
    root = make_folder({"b": 2, "a": 1, "10": 1, "9": 1})
    (root / "a" / "deep" / "er").mkdir(parents=True)
    picture(8, 8).save(root / "a" / "deep" / "er" / "x.png")
    (root / "a" / ".DS_Store").write_bytes(b"junk")
    (root / ".git").mkdir()
    manifest = scan_images(root)
    assert manifest.classes == ("10", "9", "a", "b")  # as strings
    assert manifest.paths == ("10/000.jpg", "9/000.jpg", "a/000.jpg", "a/deep/er/x.png", "b/000.jpg", "b/001.jpg")
    assert manifest.labels == (0, 1, 2, 2, 3, 3)
    assert manifest.root == root
    assert manifest.skipped == ()
    assert len(manifest) == 6


def test_missing_root_and_file_as_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set folder .*nowhere: check the path"):
        scan_images(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file: pass the folder"):
        scan_images(tmp_path / "file")


def test_root_without_class_folders(tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    with pytest.raises(ValueError, match=r"no class folders \(it is empty\)"):
        scan_images(root)
    picture(8, 8).save(root / "a.jpg")
    with pytest.raises(ValueError, match=r"files lie in it directly\): put the images into one sub-folder per class"):
        scan_images(root)


def test_empty_class_folder_is_named(make_folder):
    root = make_folder({"full": 1, "hollow": 0})
    with pytest.raises(ValueError, match=r"class folder\(s\) 'hollow' of .*images: fill or remove"):
        scan_images(root)


def write_text(path):
    path.write_text("no image")


def write_truncated(path):
    picture(64, 64).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-300])


BAD = {
    "truncated": (write_truncated, "truncated"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_an_error_or_skipped(make_folder, kind):
    write, reason = BAD[kind]
    root = make_folder({"a": 2, "b": 1})
    write(root / "a" / "bad.jpg")
    with pytest.raises(ValueError, match=rf"1 file\(s\) below .*\n  a/bad\.jpg: .*{reason}") as info:
        scan_images(root)
    assert "--data.on-bad-image skip" in str(info.value)
    manifest = scan_images(root, on_bad_image="skip")
    assert manifest.paths == ("a/000.jpg", "a/001.jpg", "b/000.jpg")
    assert manifest.labels == (0, 0, 1)
    [(path, why)] = manifest.skipped
    assert path == "a/bad.jpg"
    assert reason in why
    assert "a/bad.jpg" in scan_images(root, verify=False).paths


def test_only_the_first_bad_files_are_shown(make_folder):
    root = make_folder({"a": 1})
    for i in range(7):
        write_text(root / "a" / f"bad{i}")
    with pytest.raises(ValueError, match=r"7 file\(s\) below (.|\n)*bad4: not an image of .* … and 2 more") as info:
        scan_images(root)
    assert "bad5" not in str(info.value)


def test_class_that_lost_all_its_files(make_folder):
    root = make_folder({"a": 1, "b": 0})
    write_text(root / "b" / "bad")
    with pytest.raises(ValueError, match=r"no usable image is left in the class folder\(s\) 'b'"):
        scan_images(root, on_bad_image="skip")


def test_only_new_and_changed_files_are_verified_again(make_folder, verified):
    root = make_folder({"a": 3})
    first = scan_images(root)
    assert verified == ["000.jpg", "001.jpg", "002.jpg"]
    verified.clear()
    assert scan_images(root) == first
    assert verified == []
    write_truncated(root / "a" / "001.jpg")
    picture(8, 8).save(root / "a" / "new.jpg")
    os.utime(root / "a" / "002.jpg", ns=(1, 1))
    assert scan_images(root, on_bad_image="skip").skipped[0][0] == "a/001.jpg"
    assert verified == ["001.jpg", "002.jpg", "new.jpg"]
    verified.clear()
    scan_images(root, on_bad_image="skip")
    assert verified == ["001.jpg"]  # bad ones are looked at again


def test_results_survive_an_interruption(make_folder, monkeypatch, verified):
    root = make_folder({"a": 3})
    with monkeypatch.context() as patch:

        def interrupt(reader, index):
            if reader.name(index).endswith("002.jpg"):
                raise KeyboardInterrupt
            return ""

        patch.setattr(verify, "_defect", interrupt)
        patch.setattr(verify, "_TOGETHER", 1)
        with pytest.raises(KeyboardInterrupt):
            scan_images(root)
    scan_images(root)
    assert verified == ["002.jpg"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": 2, "files": 3}', b"\xff"])
def test_damaged_cache_is_ignored_and_rewritten(make_folder, cache, verified, damage):
    root = make_folder({"a": 1})
    scan_images(root)
    [file] = (cache / "manifests").iterdir()
    file.write_bytes(damage)
    verified.clear()
    scan_images(root)
    scan_images(root)
    assert verified == ["000.jpg"]


def test_unwritable_cache_only_warns(make_folder, cache):
    cache.touch()  # a file where the folder should be
    with pytest.warns(UserWarning, match="could not be kept for the next scan"):
        assert len(scan_images(make_folder({"a": 1}))) == 1


def test_threads_find_the_same(make_folder, monkeypatch):
    root = make_folder({"a": 5})
    write_truncated(root / "a" / "bad.jpg")
    monkeypatch.setattr(verify, "_TOGETHER", 2)
    manifest = scan_images(root, on_bad_image="skip", workers=2, progress=True)
    assert [path for path, _ in manifest.skipped] == ["a/bad.jpg"]
    assert len(manifest) == 5


def listed(*counts: int) -> Manifest:
    labels = tuple(np.repeat(range(len(counts)), counts).tolist())
    classes = tuple(f"c{i}" for i in range(len(counts)))
    return Manifest("/r", classes, tuple(f"{label}/{i}" for i, label in enumerate(labels)), labels)


def test_fingerprint_covers_classes_paths_and_labels_but_not_the_root():
    base = Manifest("/r", ("a", "b"), ("a/1", "b/1"), (0, 1))
    assert base.fingerprint == Manifest("/elsewhere", ("a", "b"), ("a/1", "b/1"), (0, 1), (("a/2", ""),)).fingerprint
    others = [
        Manifest("/r", ("a", "c"), ("a/1", "b/1"), (0, 1)),
        Manifest("/r", ("a", "b"), ("b/1", "a/1"), (0, 1)),
        Manifest("/r", ("a", "b"), ("a/1", "b/1"), (1, 0)),
        Manifest("/r", ("a", "b", "a/1"), ("b/1",), (0, 1)),
        Manifest("/r", ("ab",), ("a/1", "b/1"), (0, 1)),
    ]
    assert len({m.fingerprint for m in [base, *others]}) == 6


@pytest.mark.parametrize(("n", "expected"), [(7, [4, 2, 1]), (1, [1, 0, 0]), (10, [6, 3, 1]), (69, [39, 20, 10])])
def test_holdout_is_proportional_and_exact(n, expected):
    whole = listed(40, 20, 10)
    train, held = whole.holdout(n, seed=3)
    assert np.bincount(held.labels, minlength=3).tolist() == expected
    pairs = list(zip(whole.paths, whole.labels, strict=True))
    for part in (train, held):
        mine = set(zip(part.paths, part.labels, strict=True))
        assert list(zip(part.paths, part.labels, strict=True)) == [pair for pair in pairs if pair in mine]
    assert sorted(train.paths + held.paths) == sorted(whole.paths)
    assert train.classes == held.classes == whole.classes


def test_holdout_depends_on_the_seed_alone():
    whole = listed(40, 20, 10)
    assert whole.holdout(20, seed=1) == whole.holdout(20, seed=1)
    assert whole.holdout(20, seed=1) != whole.holdout(20, seed=2)


def test_holdout_draws_each_class_by_itself():
    held = listed(40, 40).holdout(20, seed=1)[1]
    positions = [int(path.rpartition("/")[2]) % 40 for path in held.paths]
    assert positions[:10] != positions[10:]


@pytest.mark.parametrize("n", [-1, 0, 70, 71])
def test_impossible_holdout(n):
    with pytest.raises(ValueError, match=f"cannot hold out {n} of 70 images: it must be between 1 and 69"):
        listed(40, 20, 10).holdout(n, seed=0)


def test_require_same_classes_names_the_differences():
    train = Manifest("/train", tuple("abcdefgh"), (), ())
    train.require_same_classes(Manifest("/val", tuple("abcdefgh"), (), ()))
    with pytest.raises(ValueError, match=r"/val must have the class folders of /train, but it lacks 'h'$"):
        train.require_same_classes(Manifest("/val", tuple("abcdefg"), (), ()))
    with pytest.raises(ValueError, match=r"lacks 'b', 'c', 'd', 'e', 'f' … and 2 more and adds 'z'$"):
        train.require_same_classes(Manifest("/val", ("a", "z"), (), ()))


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MASKCF_CACHE", str(tmp_path / "own"))
    assert cache_dir("a", "b") == tmp_path / "own" / "a" / "b"
    monkeypatch.delenv("MASKCF_CACHE")
    assert cache_dir("a") == tmp_path / "xdg" / "maskcf_fast" / "a"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "maskcf_fast"
    assert cache_dir().is_dir()


def test_links_are_followed_once(make_folder):
    root = make_folder({"cat": 1, "dog": 1})
    for name in ("cat", "dog"):
        (root / name / "up").symlink_to("..")
        (root / name / "self").symlink_to(".")
    (root / "linked").symlink_to(make_folder({"cat": 0}) / "dog")
    (root / "dog" / "deep").symlink_to(root / "cat")
    assert scan_images(root).paths == (
        "cat/000.jpg",
        "dog/000.jpg",
        "dog/deep/000.jpg",
        "linked/000.jpg",
        "linked/deep/000.jpg",
    )
    (root.parent / "elsewhere").symlink_to(root)
    assert len(scan_images(root.parent / "elsewhere")) == 5


def test_what_systems_leave_behind_is_no_image(make_folder):
    root = make_folder({"a": 1})
    for name in ("a/Thumbs.db", "a/desktop.ini", "a/@eaDir/x.jpg", "__MACOSX/a/._000.jpg", "a/._000.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"junk")
    assert scan_images(root).paths == ("a/000.jpg",)


def test_a_name_is_the_same_composed_and_decomposed(make_folder):
    one, other = (scan_images(make_folder({name: 1, "z": 1})) for name in ("caf\u00e9", "cafe\u0301"))
    assert one.classes == ("caf\u00e9", "z") == other.classes  # the second scan finds both folders
    assert other.labels == (0, 0, 1)


def test_a_pipe_is_refused_without_a_scan_too(make_folder):
    root = make_folder({"a": 1})
    os.mkfifo(root / "a" / "pipe")
    reader = scan_images(root, verify=False).reader()
    with pytest.raises(ImageError, match=r"a/pipe: not a regular file"):
        reader.image(1)


def test_a_link_to_itself_is_a_file_that_is_not_usable(make_folder):
    root = make_folder({"a": 1})
    (root / "loop").symlink_to("loop")
    assert scan_images(root).classes == ("a",)
    (root / "a" / "loop").symlink_to("loop")
    assert scan_images(root, on_bad_image="skip").skipped == (("a/loop", "Too many levels of symbolic links"),)


def test_pictures_are_found_in_links_and_alone(make_folder, tmp_path):
    root = make_folder({"a": 1})
    (root / "a" / "b.JPEG").symlink_to(root / "a" / "000.jpg")
    (root / "out").mkdir()
    picture(8, 8).save(root / "out" / "old.png")
    (tmp_path / "linked").symlink_to(root)
    found = find_pictures(tmp_path / "linked", without=root / "out")
    assert [path.name for path in found] == ["000.jpg", "b.JPEG"]
    assert find_pictures(root / "a" / "000.jpg") == [root / "a" / "000.jpg"]
    with pytest.raises(ValueError, match="there are no images in"):
        find_pictures(root, without=root)


def test_a_cache_folder_that_cannot_be_made_says_what_mends_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASKCF_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot make the cache folder .*file/a.*: set MASKCF_CACHE"):
        cache_dir("a")
