"""A run's folder: whether a run may begin or go on in it, and one process at a time that writes to it."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from ..core.errors import UserError
from ..core.files import check_writable, temporaries
from .checkpoint import checkpoints, remove_old
from .finite import NOT_FINITE

AUTO = Path("auto")  # --resume auto
LOCK = ".lock"
# What there is before the first step, and costs nothing to make again.
STARTED = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", LOCK, NOT_FINITE}
BEST = "best.safetensors"  # is written after the first checkpoint


def prepare(folder: Path, resume: Path | None) -> bool:
    """Whether a run in ``folder`` goes on (True) or begins.

    Args:
        folder: Of the run.
        resume: As in the settings; `AUTO` goes on where there is something to go on with.

    Raises:
        ValueError: It is to begin, and there is a run of at least one step, or files that are no run's; or a file lies
            where a folder must be.
    """
    check_writable(folder)
    kept = folder / "checkpoints"
    if files := [path for path in (kept, *kept.glob("step-*")) if path.is_file()]:
        raise UserError(f"{files[0]} is a file where a run has a folder: remove it, or choose another --out")
    trained = any(path.name != "step-0" for path in checkpoints(folder))
    if resume == AUTO:
        if trained:
            return True
    elif resume is not None:
        return True
    if trained:
        raise UserError(
            f"{folder} already holds a run: --resume {folder} (or the same command and --resume auto) continues it, or "
            "choose another --out"
        )
    if folder.exists():
        own = {path.name for path in temporaries(folder)} | STARTED | ({BEST} if checkpoints(folder) else set())
        if others := sorted({path.name for path in folder.iterdir()} - own):
            raise UserError(
                f"--out {folder} holds other files ({', '.join(others[:3])}): choose an empty or new folder"
            )
    return False


def clean(folder: Path, keep: int) -> None:
    """Remove what a killed process left half written, and checkpoints beyond the newest ``keep``. Lock it before.

    With ``keep`` 0, that of a run that is to begin again.
    """
    for path in [*temporaries(folder), *([] if keep else [folder / BEST, folder / NOT_FINITE])]:
        path.unlink(missing_ok=True)
    remove_old(folder, keep)


class Lock:
    """Keeps a folder for this process, until `release` or the process's end, however it comes.

    A record lock of POSIX: the system lets go of it when the process dies, forked processes do not inherit it, and
    NFS servers keep it, too. Where a file system has no locks, there is none.

    Args:
        folder: Made if missing.

    Raises:
        UserError: Another process has it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOCK
        while True:
            self._file = self._path.open("a+")
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self._file.seek(0)
                holder = self._file.read(200).strip() or "another process"
                self._file.close()
                raise UserError(
                    f"{folder} is in use by {holder}: wait until it has ended, or choose another --out"
                ) from None
            except OSError as error:
                print(f"{folder} cannot be locked ({error.strerror}): see to it that no other process trains there")
                break
            if self._is_in_place():  # its last owner may just have removed it
                break
            self._file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let others have the folder."""
        with suppress(OSError):
            if not self._file.closed and self._is_in_place():
                self._path.unlink()
        self._file.close()

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
