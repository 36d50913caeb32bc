import io
import os
import tarfile

import pytest
from pictures import encoded, picture
from tars import write_tar

from maskcf_fast.core.errors import UserError
from maskcf_fast.data import scan_images
from maskcf_fast.data import shards as module


def jpeg(seed: int = 0) -> bytes:
    return encoded(picture(40, 30, seed=seed))


def test_lists_images_with_labels_of_cls_and_json(tmp_path):
    write_tar(tmp_path / "s" / "01.tar", {"d/b.x.png": jpeg(), "d/b.json": b'{"label": 2}', ".hidden.jpg": b""})
    write_tar(tmp_path / "s" / "00.tar", {"a.cls": b"1\n", "a.jpg": jpeg(3), "a.txt": b"caption"})
    manifest = scan_images(tmp_path / "s")
    assert manifest.paths == ("00.tar:a.jpg", "01.tar:d/b.x.png")
    assert manifest.labels == (1, 2)
    assert manifest.classes == ("0", "1", "2")
    [(offset, size), _] = manifest.spans
    assert (tmp_path / "s" / "00.tar").read_bytes()[offset : offset + size] == jpeg(3)
    assert scan_images(tmp_path / "s" / "{00..01}.tar") == manifest
    assert scan_images(tmp_path / "s" / "01.tar").paths == ("01.tar:d/b.x.png",)
    (tmp_path / "s" / "classes.txt").write_text("cat\ndog\nfox\n")
    assert scan_images(tmp_path / "s").classes == ("cat", "dog", "fox")
    (tmp_path / "s" / "classes.txt").write_text("cat\n\ndog\nfox\n\n")
    with pytest.raises(UserError, match=r"classes\.txt has nothing on line 2, and classes are numbers"):
        scan_images(tmp_path / "s")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "s").mkdir()
    return tmp_path / "s"


def test_class_names(folder):
    write_tar(folder / "0.tar", {"a.jpg": jpeg(), "a.cls": b"dog", "b.jpg": jpeg(), "b.cls": b"cat"})
    assert scan_images(folder).labels == (1, 0)
    (folder / "classes.txt").write_text("dog\ncat\n")
    assert scan_images(folder).labels == (0, 1)
    (folder / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"0\.tar:a\.jpg has the class 'dog', which is not one of the 1 in"):
        scan_images(folder)


def test_bad_samples_are_errors_or_skipped(folder):
    files = {"a.jpg": jpeg(), "a.cls": b"0", "b.jpg": b"junk", "b.cls": b"0", "c.jpg": jpeg(), "d.cls": b"0"}
    write_tar(folder / "0.tar", files)
    with pytest.raises(ValueError, match=r"3 file\(s\) below .*\n(.|\n)*0\.tar:b\.jpg: not an image"):
        scan_images(folder)
    manifest = scan_images(folder, on_bad_image="skip")
    assert manifest.paths == ("0.tar:a.jpg",)
    assert {path for path, _ in manifest.skipped} == {"0.tar:b.jpg", "0.tar:c.jpg", "0.tar:d"}


def test_bad_shards(folder):
    with pytest.raises(FileNotFoundError, match=r"2 of 2 tar shard\(s\) are missing.*08\.tar: check the path"):
        scan_images(folder / "{08..09}.tar")
    with pytest.raises(ValueError, match=r"stands for 10,000,000,000 shards: at most 1,000,000 are read"):
        scan_images(folder / "{00000..99999}-{00000..99999}.tar")
    os.mkfifo(folder / "0.tar")  # waits for whoever writes to it
    with pytest.raises(FileNotFoundError, match=r"1 of 1 tar shard\(s\) are missing or no files, first .*0\.tar"):
        scan_images(folder)
    (folder / "0.tar").unlink()
    (folder / "0.tar").write_bytes(b"junk" * 500)
    with pytest.raises(ValueError, match=r"0\.tar is no tar file that can be read .*: get it again"):
        scan_images(folder)
    write_tar(folder / "0.tar", {"a.cls": b"0", "a.jpg": jpeg()})
    whole = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(whole[:1800])
    with pytest.raises(ValueError, match=r"0\.tar is cut short within a\.jpg"):
        scan_images(folder)


@pytest.mark.parametrize("damage", ["at a member", "in a header", "bit of a header", "empty blocks", "no end"])
def test_a_damaged_shard_is_not_a_shorter_one(folder, damage):
    files = {f"{i}.{extension}": data for i in range(4) for extension, data in (("cls", b"0"), ("jpg", jpeg()))}
    write_tar(folder / "0.tar", files)
    assert len(scan_images(folder)) == 4
    whole = bytearray((folder / "0.tar").read_bytes())
    with tarfile.open(folder / "0.tar") as archive:
        members = archive.getmembers()
    start, last = members[4].offset, members[-1].offset_data + (members[-1].size + 511) // 512 * 512
    if damage == "at a member":
        whole = whole[:start]
    elif damage == "in a header":
        whole = whole[: start + 100]
    elif damage == "bit of a header":
        whole[start + 3] ^= 1
    elif damage == "empty blocks":
        whole[start : start + 1024] = bytes(1024)
    else:
        whole = whole[:last]
    (folder / "0.tar").write_bytes(whole)
    with pytest.raises(ValueError, match=r"0\.tar is damaged or cut short at byte \d+: get it again"):
        scan_images(folder)


@pytest.mark.parametrize("label", [b"-1", b"9999999"])
def test_labels_that_are_no_classes(folder, label):
    write_tar(folder / "0.tar", {"a.cls": label, "a.jpg": jpeg()})
    with pytest.raises(ValueError, match=rf"a\.jpg has a class outside 0 to 100000 \({label.decode()}\)"):
        scan_images(folder)


def test_an_index_is_built_once(folder, monkeypatch):
    write_tar(folder / "0.tar", {"a.cls": b"0", "a.jpg": jpeg()})
    manifest = scan_images(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read_shard", lambda *_: pytest.fail("read again"))
        assert scan_images(folder) == manifest
    write_tar(folder / "0.tar", {"a.cls": b"0", "a.jpg": jpeg(), "b.cls": b"0", "b.jpg": jpeg(1)})
    assert len(scan_images(folder)) == 2


def test_names_with_dots_have_a_class_each(folder):
    files = {f"2024.05.{i}.{kind}": data for i in (1, 2) for kind, data in (("jpg", jpeg(i)), ("cls", b"%d" % i))}
    write_tar(folder / "0.tar", files)
    manifest = scan_images(folder)
    assert manifest.paths == ("0.tar:2024.05.1.jpg", "0.tar:2024.05.2.jpg")
    assert manifest.labels == (1, 2)
    write_tar(folder / "0.tar", {"a.left.jpg": jpeg(), "a.right.jpg": jpeg(), "a.cls": b"0"})
    with pytest.raises(ValueError, match=r"several images \(a\.left\.jpg, a\.right\.jpg\).* ends at the first dot"):
        scan_images(folder)


def test_joined_archives_are_read_to_the_end(folder, tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}", {f"{i}.jpg": jpeg(i), f"{i}.cls": b"0"})
    (folder / "0.TAR").write_bytes(b"".join((tmp_path / f"{i}").read_bytes() for i in range(3)))
    manifest = scan_images(folder)
    assert manifest.paths == ("0.TAR:0.jpg", "0.TAR:1.jpg", "0.TAR:2.jpg")
    assert [manifest.reader().encoded(i) for i in range(3)] == [jpeg(i) for i in range(3)]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_compressed_shards_say_so(folder, mode, name):
    with tarfile.open(folder / name, mode) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    for source in (folder, folder / name):
        with pytest.raises(ValueError, match=r"compressed.*unpack"):
            scan_images(source)


def test_links_within_a_shard(folder):
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name, kind, data in [
            ("d/a.jpg", tarfile.REGTYPE, jpeg(1)), ("d/a.cls", tarfile.REGTYPE, b"0"),
            ("d/b.jpg", tarfile.LNKTYPE, "d/a.jpg"), ("d/b.cls", tarfile.SYMTYPE, "a.cls"),
            ("d/c.jpg", tarfile.SYMTYPE, "../../outside.jpg"), ("d/c.cls", tarfile.REGTYPE, b"0"),
        ]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            else:
                member.linkname = data
                archive.addfile(member)
    manifest = scan_images(folder, on_bad_image="skip")
    assert manifest.paths == ("0.tar:d/a.jpg", "0.tar:d/b.jpg")
    assert manifest.reader().encoded(1) == jpeg(1)
    assert manifest.skipped[0][0] == "0.tar:d/c"


def test_a_listed_name_is_one_even_if_it_looks_like_a_number(folder):
    (folder / "classes.txt").write_text("7\n007\ncafe\u0301\n")
    labels = {"a": b"007", "b": b"7", "c": b"2", "d": "caf\u00e9".encode(), "e": "7".encode("utf-16")}
    write_tar(
        folder / "0.tar", {f"{k}.{x}": v for k, label in labels.items() for x, v in (("jpg", jpeg()), ("cls", label))}
    )
    assert scan_images(folder).labels == (1, 0, 2, 2, 0)


def test_deep_json_is_no_class(folder):
    write_tar(folder / "0.tar", {"a.jpg": jpeg(), "a.json": b"[" * 100_000, "b.jpg": jpeg(), "b.cls": b"0"})
    assert [reason for _, reason in scan_images(folder, on_bad_image="skip").skipped] == [
        'no class: neither a.cls nor "label" in a.json'
    ]
