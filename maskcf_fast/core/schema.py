"""What is read back from a file, held against the type that it was written from."""

from __future__ import annotations

import os
import stat
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError
from .files import parse_json

MOST_BYTES = 2**28


class WrongKind(UserError):
    """A value that is not of the type that was written."""


class Range:
    """Bounds of a number, both included: ``Annotated[float, Range(0, 100)]``."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __repr__(self) -> str:
        return f"from {self.low} to {self.high}"


def read_record(path: Path, hint: Any, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds, as `conform` has it.

    Args:
        path: A regular file.
        hint: The type that it must hold.
        most: Bytes that it may have.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no JSON file, too large, or holds something else; names the file and the place in it.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        raise UserError(f"{path} is no regular file of at most {most:,} bytes")
    return conform(parse_json(path.read_bytes(), path), hint, str(path))


def conform(value: Any, hint: Any, where: str) -> Any:
    """A value read from JSON as the type that it must have.

    Args:
        value: Of dictionaries, lists, texts, bytes, finite numbers, truth values and None.
        hint: ``Any``, a scalar type, a ``Literal``, a union, ``list``, ``tuple`` or ``dict`` of such, or a dataclass
            with no more and no fewer fields than the value has; a number may be ``Annotated`` with a `Range`.
        where: What the value is called in messages.

    Raises:
        WrongKind: It is not; names the place, the value and what is expected.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        number, bounds = conform(value, arguments[0], where), arguments[1]
        if not bounds.low <= number <= bounds.high:
            raise WrongKind(f"{where}: {number} does not lie in [{bounds.low}, {bounds.high}]")
        return number
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return conform(value, choice, where)
            except WrongKind:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000:
            return float(value)
    elif hint in (int, str, bool, bytes):
        if type(value) is hint and (hint is not int or abs(value) < 2**63):
            return value
    elif origin in (list, tuple) and isinstance(value, list):
        kinds = arguments[:1] * len(value) if origin is list or arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return origin(conform(value[i], kind, f"{where}[{i}]") for i, kind in enumerate(kinds))
    elif origin is dict and isinstance(value, dict):
        return {key: conform(item, arguments[1], f"{where}: {key}") for key, item in value.items()}
    elif is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        wanted = get_type_hints(hint, include_extras=True)
        names = [field.name for field in fields(hint)]
        if set(names) == set(value):
            items = {name: conform(value[name], wanted[name], f"{where}: {name}") for name in names}
            try:
                return hint(**items)
            except UserError as error:  # what the record itself refuses
                raise WrongKind(f"{where}: {error}") from error
        raise WrongKind(f"{where} must have {', '.join(names)}, it has {', '.join(map(repr, value)) or 'nothing'}")
    shown = repr(value)
    name = getattr(hint, "__name__", None) if not arguments else None
    raise WrongKind(f"{where}: {shown[:60]}{'…' if shown[60:] else ''} is not {name or hint}")
