"""The package's cache folder, text as other systems write it, and writing files that must never end up half written."""

from __future__ import annotations

import codecs
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

# The marks of UTF-32 begin as those of UTF-16 do, so they come first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def cache_dir(*parts: str) -> Path:
    """Make and return a folder of the package's cache.

    Args:
        *parts: Names of the sub-folders, outermost first.

    Returns:
        The folder, in ``$MASKCF_CACHE``, ``$XDG_CACHE_HOME/maskcf_fast`` or ``~/.cache/maskcf_fast``.

    Raises:
        OSError: The folder cannot be made.
    """
    if own := os.environ.get("MASKCF_CACHE"):
        base = Path(own)
    elif xdg := os.environ.get("XDG_CACHE_HOME"):
        base = Path(xdg) / "maskcf_fast"
    else:
        base = Path.home() / ".cache" / "maskcf_fast"
    folder = base.expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot make the cache folder {folder} ({error.strerror}): set MASKCF_CACHE to one that can be written",
        ) from error
    return folder


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` as a whole when the block ends well.

    A reader, or a crash, finds the old bytes or the new, never a mix. What a crash leaves beside it, `temporaries`
    finds.

    Raises:
        OSError: Writing failed; the old file is untouched and nothing is left beside it.
    """
    path = Path(path)
    # In the same folder, because a rename is only atomic within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; give this one what open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file as a whole; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def check_writable(folder: Path, file: str = "") -> None:
    """Raise before much work where its results could not be written in the end.

    Args:
        folder: Of the results; it need not be there yet.
        file: Name of a file to be written in it: the folder is then made.

    Raises:
        UserError: The folder cannot be made or written to, or the file is a folder.
    """
    try:
        if file:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:  # the latter of a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {folder} ({reason}): choose another --out") from error
    if file and (folder / file).is_dir():
        raise UserError(f"{folder / file} is a folder: choose another --out, or remove it")


def temporaries(folder: Path) -> list[Path]:
    """What crashes left of unfinished `replacing` in a folder."""
    return [path for path in folder.glob(".*.tmp") if path.is_file()]


@contextmanager
def explained(path: str | os.PathLike[str], size: int) -> Iterator[None]:
    """Say of a failed write what it was, how large, and what to do."""
    try:
        yield
    except OSError as error:
        kept = "; the one before is intact" if os.path.exists(path) else ""
        raise OSError(
            error.errno,
            f"cannot write {path} ({size / 2**20:.1f} MiB): {error.strerror or error}{kept}. Free space or permit it, "
            "then run the same command again (a training run: with --resume)",
        ) from error


def composed(name: str) -> str:
    """``name`` in composed Unicode (NFC): what one system writes as "é", another does as "e" and an accent."""
    return unicodedata.normalize("NFC", name)


def decode_text(data: bytes, source: str | os.PathLike[str]) -> str:
    """Text as any system writes it, in composed Unicode and with ``\\n`` as line end.

    Args:
        data: UTF-8, or UTF-16 or UTF-32, which a byte-order mark or the zeros of plain letters tell.
        source: Where it comes from, for the message.

    Raises:
        ValueError: It is in no such encoding.
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data:
        encoding = "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise UserError(f"{os.fspath(source)} is not in UTF-8 ({where}): save it as UTF-8") from error
    return composed(text.replace("\r\n", "\n").replace("\r", "\n"))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold anything, without the space around them, decoded by `decode_text`.

    Raises:
        OSError: It cannot be read.
        ValueError: Its encoding is not known.
    """
    return [line.strip() for line in decode_text(path.read_bytes(), path).split("\n") if line.strip()]


def parse_json(text: str | bytes, source: str | os.PathLike[str]) -> Any:
    """What a JSON text holds.

    Args:
        text: The text, or its bytes as `decode_text` takes them.
        source: Where it comes from, for the message.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    text = text if isinstance(text, str) else decode_text(text, source)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the former also of a number of thousands of digits
        raise UserError(f"{os.fspath(source)} holds no JSON that can be read: {error}") from error


def read_yaml(path: Path) -> Any:
    """What a YAML or JSON file holds, every scalar as its text: YAML would make ``no`` false and ``001`` one.

    Raises:
        OSError: It cannot be read.
        ValueError: It is neither, or nested too deeply.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise UserError(f"{path} says {twice} twice: YAML would take the last alone")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(decode_text(path.read_bytes(), path), Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; errors as `parse_json`, and OSError."""
    return parse_json(path.read_bytes(), path)
