"""The one reader: where an orientation may stand, kinds of pixels, and what is refused."""

import os
import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, oriented, picture, xmp
from PIL import Image

from maskcf_fast.data import images
from maskcf_fast.data.images import ImageError, read_file, read_image

RGB = picture(40, 60)
TURNED = RGB.transpose(Image.Transpose.ROTATE_90)  # to be seen upright, it must be turned back
EXIF, XMP = oriented(6), xmp(6)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def in_png(image: Image.Image, extra: bytes, *, at_end: bool = False) -> bytes:
    data = encoded(image, "PNG")
    at = data.index(b"IEND") - 4 if at_end else 33  # else after the header
    return data[:at] + extra + data[at:]


BROKEN_EXIF = (  # of an orientation and a resolution of 5/0
    b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + struct.pack("<HHIHH", images.ORIENTATION, 3, 1, 6, 0)
    + struct.pack("<HHII", 282, 5, 1, 38) + struct.pack("<III", 0, 5, 0)
)  # fmt: skip
LONG_EXIF = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, images.ORIENTATION, 4, 1, 6) + bytes(4)
XMP_CHUNK = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
ORIENTED = {
    "JPEG": lambda image: encoded(image, quality=98, subsampling=0, exif=EXIF),
    "JPEG, big-endian LONG": lambda image: encoded(image, quality=98, subsampling=0, exif=LONG_EXIF),
    "JPEG, damaged beside it": lambda image: encoded(image, quality=98, subsampling=0, exif=BROKEN_EXIF),
    "JPEG, XMP": lambda image: encoded(image, quality=98, subsampling=0, xmp=XMP),
    "PNG, before the pixels": lambda image: in_png(image, chunk(b"eXIf", EXIF.tobytes()[6:])),
    "PNG, after the pixels": lambda image: in_png(image, chunk(b"eXIf", EXIF.tobytes()[6:]), at_end=True),
    "PNG, XMP": lambda image: in_png(image, XMP_CHUNK),
    "TIFF": lambda image: encoded(image, "TIFF", exif=EXIF),
    "WEBP": lambda image: encoded(image, "WEBP", lossless=True, exif=EXIF),
    "WEBP, XMP": lambda image: encoded(image, "WEBP", lossless=True, xmp=XMP),
}


@pytest.mark.parametrize("kind", ORIENTED)
def test_pictures_are_turned_upright(kind):
    upright = read_image(ORIENTED[kind](TURNED))
    assert upright.size == RGB.size
    assert np.abs(np.asarray(upright, int) - np.asarray(RGB)).mean() < (3 if "JPEG" in kind else 1e-9)
    assert read_image(encoded(upright, "PNG")).size == RGB.size  # nothing is left that would turn it again


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_the_standard(orientation):
    """EXIF 2.32, 4.6.4 A: which sides of the stored picture are the visual top and left."""
    rows = np.arange(24, dtype=np.uint8).reshape(4, 6)
    stored = {
        1: rows, 2: rows[:, ::-1], 3: rows[::-1, ::-1], 4: rows[::-1],
        5: rows.T, 6: np.rot90(rows), 7: rows[::-1, ::-1].T, 8: np.rot90(rows, -1),
    }[orientation]  # fmt: skip
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=oriented(orientation))
    assert np.array_equal(np.asarray(read_image(data))[..., 0], rows)
    assert np.array_equal(np.asarray(read_image(data, upright=False))[..., 0], stored)


GREY = np.asarray(picture(40, 60, mode="L"))
GREY16 = GREY.astype(np.uint16) * 257
PIXELS = {
    "16-bit PNG": (encoded(Image.fromarray(GREY16), "PNG"), GREY),
    "16-bit TIFF": (encoded(Image.fromarray(GREY16), "TIFF"), GREY),
    "16-bit big-endian TIFF": (encoded(Image.fromarray(GREY16.astype(">u2")), "TIFF"), GREY),
    "16-bit TIFF of which 0 is white": (encoded(Image.fromarray(65535 - GREY16), "TIFF", tiffinfo={262: 0}), GREY),
    "8-bit TIFF of which 0 is white": (encoded(Image.fromarray(GREY), "TIFF", tiffinfo={262: 0}), GREY),
    "16-bit JPEG 2000": (encoded(Image.fromarray(GREY16), "JPEG2000"), GREY),
    "16-bit PGM": (b"P5 40 60 65535\n" + GREY16.astype(">u2").tobytes(), GREY),
    "PGM up to 100": (b"P5 40 60 100\n" + (GREY // 2.55).astype(np.uint8).tobytes(), GREY // 2.55 * 2.55),
    "1 bit": (encoded(Image.fromarray(GREY > 128), "PNG"), (GREY > 128) * 255),
    "alpha": (encoded(picture(40, 60, mode="RGBA"), "PNG"), np.asarray(RGB)),
    "grey and alpha": (encoded(picture(40, 60, mode="LA"), "PNG"), GREY),
    "palette": (encoded(RGB.quantize(64), "PNG", transparency=3), np.asarray(RGB.quantize(64).convert("RGB"))),
    "GIF": (encoded(RGB.quantize(64), "GIF"), np.asarray(RGB.quantize(64).convert("RGB"))),
    "CMYK": (encoded(RGB.convert("CMYK"), "TIFF"), np.asarray(RGB)),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_are_8_bit_rgb(kind):
    data, expected = PIXELS[kind]
    image = read_image(data)
    assert image.mode == "RGB"
    expected = np.broadcast_to(expected.reshape(60, 40, -1), (60, 40, 3))
    assert np.abs(np.asarray(image, float) - expected).max() <= 1


def one_bit_png(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xaa" * (side // 8)) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


JPEG = encoded(RGB)
SIDES = JPEG.index(b"\xff\xc0") + 5
REFUSED = {
    "text": (b"no image", "not an image of a format that is read"),
    "nothing": (b"", "not an image"),
    "cut short": (JPEG[:-300], "truncated"),
    "without its end mark": (JPEG[:-2], "truncated"),
    "a program's format": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "100 megapixels": (one_bit_png(10_000), "10000×10000 pixels exceed the limit of 89,478,485: make it smaller"),
    "3,600 megapixels": (JPEG[:SIDES] + struct.pack(">HH", 60_000, 60_000) + JPEG[SIDES + 4 :], "pixels exceed"),
    "268 megapixels in 34 bytes": (
        b"RIFF\x1a\0\0\0WEBPVP8L\x0e\0\0\0\x2f\xfe\xbf\xff\x0f\x07\x10\x11\xfd\x0f\x44\x44\xff\x03",
        "pixels exceed the limit",
    ),
    "196 megapixels": (one_bit_png(14_000), "pixels exceed the limit"),
    "floats": (encoded(Image.fromarray(GREY / np.float32(255)), "TIFF"), "mode F has no 8-bit RGB form"),
    "32-bit integers": (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "mode I has no"),
    "a damaged PNG": (encoded(RGB, "PNG")[:-20] + bytes(20), "cannot be decoded"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_usable_picture_is_refused_with_the_reason(kind):
    data, reason = REFUSED[kind]
    with pytest.raises(ImageError, match=reason):
        read_image(data)


def test_files_that_are_no_files_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good").write_bytes(b"junk" + JPEG + b"junk")
    assert read_image(read_file(tmp_path / "good", (4, len(JPEG)))).size == RGB.size
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, reason in {"pipe": "not a regular", ".": "Is a directory", "dangling": "No such file"}.items():
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="ends 95 bytes too early"):
        read_file(tmp_path / "good", (len(JPEG), 103))
    monkeypatch.setattr(images, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="too large for a picture"):
        read_image(tmp_path / "good")


@pytest.mark.parametrize("size", [(1601, 50), (50, 1601), (60_000, 1)])
def test_of_a_very_long_picture_the_middle_is_read(size):
    whole = picture(*size)
    width, height = (min(side, 16 * min(size)) for side in size)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    expected = whole.crop((left, top, left + width, top + height))
    assert np.array_equal(read_image(encoded(whole, "PNG")), expected)
