"""The package's cache folder, and writing files that must never end up half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file as a whole: a reader, or a crash, finds the old bytes or the new, never a mix.

    Args:
        path: The file. Its folder must exist.
        data: The new contents.

    Raises:
        OSError: Writing failed; the old file is untouched and nothing is left beside it.
    """
    path = Path(path)
    # In the same folder, because a rename is only atomic within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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
