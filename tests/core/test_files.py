"""Text as other systems write it."""

import codecs

import pytest

from maskcf_fast.core.errors import UserError
from maskcf_fast.core.files import decode_text, parse_json, read_json, read_lines

LINES = ["cat", "caf\u00e9 noir", "\u732b"]
TEXT = "\n".join(LINES)


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-32"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        ("\r\n".join(LINES) + "\r\n\r\n").encode(),
        ("\r".join(LINES) + "\r").encode(),
        f"  {TEXT} \n \n".replace("\u00e9", "e\u0301").encode(),
    ],
    ids=["utf-8", "utf-8 bom", "utf-16", "utf-32", "utf-16 be", "le, no bom", "be, no bom", "crlf", "cr", "decomposed"],
)
def test_lines_of_any_system(tmp_path, data):
    (tmp_path / "names.txt").write_bytes(data)
    assert read_lines(tmp_path / "names.txt") == LINES


def test_separators_within_a_line_stay():
    assert decode_text("a\x0bb\u2028c".encode(), "x") == "a\x0bb\u2028c"


def test_another_encoding_is_named():
    with pytest.raises(UserError, match=r"names.txt is not in UTF-8 \(byte 0xe9 at 3\): save it as UTF-8"):
        decode_text("caf\u00e9".encode("latin-1"), "names.txt")


def test_json(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "x.json") == {"a": 1}
    for text in ("{", "[" * 10**6):
        with pytest.raises(UserError, match=r"config.json holds no JSON that can be read"):
            parse_json(text, "config.json")


def test_json_of_a_number_of_thousands_of_digits():
    """Which Python refuses to read, by an error of its own."""
    with pytest.raises(UserError, match=r"config\.json holds no JSON that can be read: Exceeds the limit"):
        parse_json("9" * 100_000, "config.json")
