"""Which JPEG files are of the common form, about which no two decoders disagree."""

from __future__ import annotations

import re
import struct

from .images import LONGEST, MOST_PIXELS, ORIENTATION

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman codes
_TABLES = (0xC4, 0xDB, 0xDD, 0xFE)  # Huffman, quantisation, restart interval, comment
_SAMPLING = (0x11, 0x12, 0x21, 0x22, 0x41)  # of brightness; colours have 0x11
_TURNED = re.compile(rb"(?<!/tiff:)Orientation(?!\W{1,2}1\b)")  # in XMP: another orientation than 1


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a file is a JPEG of the common form.

    8 bits of grey or of YCbCr, coded as baseline or progressive; its segments without a gap, its own end there; an
    orientation in EXIF, as the standard has it, or nowhere; of a size that `read_image` leaves as it is. Whether the
    pixels are sound is not looked at.
    """
    try:
        return data[:2] == b"\xff\xd8" and _is_plain(data)
    except (struct.error, IndexError):  # ends within a header
        return False


def _is_plain(data: bytes) -> bool:
    at, frames, exif = 2, 0, False
    while True:
        mark, kind, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF or length < 2:
            return False
        body, at = at + 4, at + 2 + length
        if kind in _FRAMES:
            if not _plain_frame(data, body):
                return False
            frames += 1
        elif kind == 0xE1:
            if data.startswith(b"Exif\0\0", body):
                if exif or not _plain_exif(data[body + 6 : at]):
                    return False
                exif = True
            elif data.startswith(b"http://ns.adobe.com/xap/1.0/", body) and _TURNED.search(data, body, at):
                return False
        elif kind == 0xEE:
            if data.startswith(b"Adobe", body) and data[body + 11] != 1:  # not YCbCr
                return False
        elif kind == 0xDA:
            break
        elif kind not in _TABLES and not 0xE0 <= kind <= 0xEF:
            return False
    end = data.find(b"\xff\xd9", at)  # of coded pixels neither this nor the next is ever a part
    return frames == 1 and end >= 0 and data.find(b"\xff\xd8", at, end) < 0


def _plain_frame(data: bytes, at: int) -> bool:
    bits, height, width, count = struct.unpack_from(">BHHB", data, at)
    parts = [data[at + 6 + 3 * i : at + 9 + 3 * i] for i in range(count)]
    sides = sorted((height, width))
    return (
        bits == 8
        and 0 < sides[1] <= LONGEST * sides[0]
        and height * width <= MOST_PIXELS
        and (count == 1 or (count == 3 and parts[0][1] in _SAMPLING and parts[1][1] == parts[2][1] == 0x11))
        and bytes(part[0] for part in parts) != b"RGB"
    )


def _plain_exif(data: bytes) -> bool:
    """Whether the first directory states at most one orientation, in the way that every reader understands."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return False
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [struct.unpack_from(f"{order}HHIH", data, start + 2 + 12 * i) for i in range(count)]
    stated = [entry[1:] for entry in entries if entry[0] == ORIENTATION]
    return not stated or (len(stated) == 1 and stated[0][:2] == (3, 1) and 1 <= stated[0][2] <= 8)
