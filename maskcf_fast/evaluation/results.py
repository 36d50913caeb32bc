"""``results.json``: what was measured, so that nothing is measured twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .._cache import atomic_write
from .measure import Measurement

VERSION = 1
FIELDS = [field.name for field in dataclasses.fields(Measurement)]


class Results:
    """The measurements in a file, by a key that tells the weights, the data and the precision.

    Args:
        path: The file; it need not exist.
        writes: Whether to write it: one process does.

    Raises:
        ValueError: The file is not one of these.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._saved: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']}, not {VERSION}")
            self._saved = dict(content["measurements"])
            for key in self._saved:
                self.find(key)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no results that can be continued ({error!r}): choose another --out, or remove it"
            ) from error

    def find(self, key: str) -> Measurement | None:
        """What was measured, or None."""
        saved = self._saved.get(key)
        return None if saved is None else Measurement.from_json({name: saved[name] for name in FIELDS})

    def add(self, key: str, measurement: Measurement, **about: Any) -> None:
        """Keep a measurement, on disk too; ``about`` is for readers."""
        self._saved[key] = {**about, **dataclasses.asdict(measurement)}
        self.write({})

    def write(self, report: dict[str, Any]) -> None:
        """Write the file, and its folder, with ``report`` before the measurements."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"version": VERSION, **report, "measurements": self._saved}
            atomic_write(self.path, json.dumps(content, indent=1).encode())
