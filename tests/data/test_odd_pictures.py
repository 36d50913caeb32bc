"""What decoders disagree about: whatever the scan passes, all backends see as the same picture."""

import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from pictures import encoded, xmp
from PIL import Image

from maskcf_fast.data import LoaderConfig, LoadingError, build_loader, dali, scan_images
from maskcf_fast.data.jpeg import is_plain_jpeg
from maskcf_fast.data.transforms import resize_and_crop

Y, X = np.mgrid[:48, :64]
VALUES = np.stack([X * 4, Y * 5, (X + Y) * 2], -1).astype(np.uint8)  # no two of its turned forms look alike
PICTURE = Image.fromarray(VALUES)
CONFIG = LoaderConfig(batch_size=64, image_size=32, train=False, threads=1)


def segment(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


def with_segment(kind: int, body: bytes) -> bytes:
    return JPEG[:2] + segment(kind, body) + JPEG[2:]


def exif(orientation: int, kind: int = 3, count: int = 1) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHHI", 0x112, kind, count, orientation, 0, 0)


def rgb555() -> bytes:
    packed = VALUES.astype(np.uint16)[::-1] >> 3
    pixels = (packed[..., 0] << 10 | packed[..., 1] << 5 | packed[..., 2]).astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 64, 48, 1, 16, 0, len(pixels), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
JPEG, PNG, CMYK = (
    encoded(PICTURE, quality=95),
    encoded(PICTURE, "PNG"),
    encoded(PICTURE.convert("CMYK"), quality=95),
)
TABLE, FRAME, ADOBE = JPEG.index(b"\xff\xdb"), JPEG.index(b"\xff\xc0"), CMYK.index(b"Adobe") - 4
PLAIN = {
    "baseline": JPEG,
    "grey": encoded(PICTURE.convert("L")),
    "progressive": encoded(PICTURE, quality=95, progressive=True),
    "not subsampled": encoded(PICTURE, quality=95, subsampling=0),
    "junk behind it": JPEG + b"junk" * 99,
    "two pictures": encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)]),
    "EXIF, upright": with_segment(0xE1, exif(1)),
    "EXIF, turned": with_segment(0xE1, exif(6)),
    "XMP, upright": with_segment(0xE1, XMP_MARK + xmp(1)),
    "ICC": encoded(PICTURE, icc_profile=b"x" * 200),
}
ODD = {
    "extraneous byte": JPEG[:TABLE] + b"\0" + JPEG[TABLE:],
    "junk in place of its end": JPEG[:-2] + b"junk" * 9,
    "fill bytes": JPEG[:TABLE] + b"\xff\xff" + JPEG[TABLE:],
    "XMP, turned": with_segment(0xE1, XMP_MARK + xmp(6)),
    "EXIF, turned by a LONG": with_segment(0xE1, exif(6, kind=4)),
    "EXIF, no such orientation": with_segment(0xE1, exif(9)),
    "EXIF, two orientations": with_segment(0xE1, exif(6, count=2)),
    "EXIF, cut short": with_segment(0xE1, exif(6)[:18]),
    "EXIF, twice": JPEG[:2] + segment(0xE1, exif(1)) + segment(0xE1, exif(6)) + JPEG[2:],
    "CMYK": CMYK,
    "CMYK without Adobe's mark": CMYK[:ADOBE] + CMYK[ADOBE + 2 + struct.unpack(">H", CMYK[ADOBE + 2 : ADOBE + 4])[0] :],
    "RGB, not YCbCr": with_segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"),
    "very long": encoded(Image.fromarray(np.tile(VALUES, (1, 20, 1)))),
    "PNG": PNG,
    "PNG without its end": PNG[:-12],
    "PNG of 16 bits": encoded(Image.fromarray(VALUES[..., 0].astype(np.uint16) * 257), "PNG"),
    "animated PNG": encoded(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
    "transparent palette": encoded(PICTURE.quantize(64), "PNG", transparency=0),
    "animated WebP": encoded(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)], duration=100),
    "WebP with EXIF": encoded(PICTURE, "WEBP", exif=exif(6), lossless=True),
    "GIF.jpeg": encoded(PICTURE, "GIF"),
    "BMP of 16 bits.png": rgb555(),
    "PPM up to 100": b"P6\n64 48\n100\n" + (VALUES.astype(int) * 100 // 255).astype(np.uint8).tobytes(),
    "TIFF of 1 bit": encoded(PICTURE.convert("L").convert("1", dither=Image.Dither.NONE), "TIFF"),
    "pages": encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE.rotate(180)], compression="tiff_lzw"),
    "JPEG 2000, bare": encoded(PICTURE, "JPEG2000", no_jp2=True),
    "one pixel": encoded(PICTURE.crop((0, 0, 1, 1)), "PNG"),
    "thin": encoded(Image.new("RGB", (1500, 1), (9, 90, 200)), "PNG"),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The manifest of all pictures, and what each backend and the reader make of them."""
    root = tmp_path_factory.mktemp("odd")
    (root / "a").mkdir()
    for name, data in {**PLAIN, **ODD}.items():
        (root / "a" / name).write_bytes(data)
    manifest = scan_images(root)
    assert len(manifest) == len(PLAIN) + len(ODD)
    reader = manifest.reader()
    images = {"read_image": [resize_and_crop(reader.image(i), 32).astype(int) for i in range(len(manifest))]}
    for backend in ("torch", "dali"):
        if backend == "dali":
            pytest.importorskip("nvidia.dali")
        [batch] = build_loader(manifest, CONFIG, backend)
        images[backend] = list(batch.images.numpy().astype(int))
    return manifest, images


@pytest.mark.parametrize("name", {**PLAIN, **ODD})
def test_all_see_the_same_picture(seen, name):
    manifest, images = seen
    i = manifest.paths.index(f"a/{name}")
    assert np.array_equal(images["torch"][i], images["read_image"][i])
    assert np.abs(images["dali"][i] - images["torch"][i]).mean() < 0.7


@pytest.mark.parametrize("name", {**PLAIN, **ODD})
def test_only_common_jpegs_are_plain(name):
    assert is_plain_jpeg(({**PLAIN, **ODD})[name]) == (name in PLAIN)


@pytest.mark.parametrize("length", [0, 1, 3, 20, FRAME + 6, len(JPEG) // 2, -2])
def test_a_part_of_a_jpeg_is_not_plain(length):
    assert not is_plain_jpeg(JPEG[:length])


def test_a_border_is_cut_off_before_anything_else(seen):
    manifest, images = seen
    i = manifest.paths.index("a/PNG")
    expected = resize_and_crop(PICTURE.crop((5, 5, 59, 43)), 32).astype(int)
    for backend in ("torch", "dali"):
        [batch] = build_loader(manifest.subset([i]), replace(CONFIG, border=5), backend)
        assert np.abs(batch.images[0].numpy() - expected).mean() < 0.5
    assert np.abs(images["torch"][i] - expected).mean() > 1


def test_a_batch_that_dali_refuses_names_its_images(seen, monkeypatch):
    """Should a file deceive the check, the message says which and what to do."""
    monkeypatch.setattr(dali, "is_plain_jpeg", lambda data: True)
    manifest = seen[0].subset([seen[0].paths.index("a/extraneous byte")])
    with pytest.raises(LoadingError, match=r'PIL can decode each .* loader backend "torch": .*extraneous byte'):
        list(build_loader(manifest, CONFIG, "dali"))


def test_a_scan_needs_no_main_guard(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(40):
        (tmp_path / "train" / "a" / str(i)).write_bytes(PNG)
    code = (
        f"from maskcf_fast.data import scan_images\nprint(len(scan_images({str(tmp_path / 'train')!r}, workers=4)))\n"
    )
    environment = {**os.environ, "MASKCF_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, env=environment, check=True)
    assert (run.stdout, run.stderr) == ("40\n", "")
