"""``results.json``: what was measured, so that nothing is measured twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from ..core.errors import UserError
from ..core.files import atomic_write, check_writable
from ..core.schema import conform, read_record
from .measure import Measurement

VERSION: Literal[1] = 1
FIELDS = [field.name for field in dataclasses.fields(Measurement)]


class Results:
    """The measurements in a file, by a key that tells the weights, the data and the precision.

    Args:
        path: The file; it need not exist.
        command: The command that it belongs to, which writes other files beside it.
        writes: Whether to write it: one process does.

    Raises:
        ValueError: It cannot be written. The file is not one of these, or another command's.
    """

    def __init__(self, path: Path, command: str, writes: bool = True) -> None:
        self.path, self.command, self.writes = path, command, writes
        self._saved: dict[str, dict[str, Any]] = {}
        self._found: dict[str, Measurement] = {}
        if writes:
            check_writable(path.parent, path.name)
        refuse_others(path, command)
        if not path.exists():
            return
        try:
            content = read_record(path, dict[str, Any])
            conform(content.get("version"), Literal[VERSION], f"{path}: version")
            self._saved = conform(content.get("measurements"), dict[str, dict[str, Any]], f"{path}: measurements")
            for key, saved in self._saved.items():
                own = {name: value for name, value in saved.items() if name in FIELDS}
                self._found[key] = conform(own, Measurement, f"{path}: {key}")
        except UserError as error:
            raise UserError(
                f"{path} holds no results that can be continued ({error}): choose another --out, or remove it"
            ) from error

    def find(self, key: str) -> Measurement | None:
        """What was measured, or None."""
        return self._found.get(key)

    def add(self, key: str, measurement: Measurement, **about: Any) -> None:
        """Keep a measurement, on disk too; ``about`` is for readers."""
        self._found[key] = measurement
        self._saved[key] = {**about, **dataclasses.asdict(measurement)}
        self.write({})

    def write(self, report: dict[str, Any]) -> None:
        """Write the file, with ``report`` before the measurements."""
        if self.writes:
            content = {"version": VERSION, "command": self.command, **report, "measurements": self._saved}
            atomic_write(self.path, json.dumps(content, indent=1).encode())


def refuse_others(path: Path, command: str) -> None:
    """Raise a ValueError if a ``results.json`` is another command's, whose tables and pictures would be lost."""
    try:
        owner = read_record(path, dict[str, Any]).get("command", command)
    except (OSError, UserError):  # absent or damaged
        return
    if owner != command:
        raise UserError(f"{path} holds the results of {owner}, not of {command}: choose another --out")
