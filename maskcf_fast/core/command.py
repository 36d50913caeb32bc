"""What every command does: read its settings, run, and report what a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import UserError, report_errors
from .optional import need

T = TypeVar("T")
Main = Callable[[Sequence[str] | None], int]


def command(interrupted: str = "interrupted") -> Callable[[Callable[[list[str]], int | None]], Callable[..., int]]:
    """Make a ``main(arguments)`` of a function: by default of the process's arguments, and returning the exit code.

    Args:
        interrupted: What to say after Ctrl-C.
    """

    def decorate(work: Callable[[list[str]], int | None]) -> Callable[..., int]:
        @wraps(work)
        def main(arguments: Sequence[str] | None = None) -> int:
            given = sys.argv[1:] if arguments is None else list(arguments)
            return report_errors(lambda: work(given) or 0, interrupted)

        return main

    return decorate


def read_settings(kind: type[T], arguments: Sequence[str], name: str, before: Sequence[str] = (), **options: Any) -> T:
    """The settings of the command ``name``, every field an option; exits with the usage on a bad one.

    An option of several values may come several times, and ``~`` is the home folder in every path.

    Args:
        kind: Dataclass of the settings.
        arguments: The command line.
        name: What the command is called.
        before: Arguments of a file, which those of the command line take the place of.
        **options: Of ``tyro.cli``.
    """
    need("tyro")
    import tyro

    known = dict(_options(kind))
    # tyro itself would take the last occurrence alone, without a word.
    lists = [option for option, hint in known.items() if get_origin(hint) is tuple]
    for option, value in pairwise(arguments):  # a path of "" would be this folder
        if not value and Path in _kinds(known.get(option.replace("_", "-"))):
            raise UserError(f'{option} "" names no path: is a variable of the shell not set?')
    return _at_home(tyro.cli(kind, args=[*before, *_joined(arguments, lists)], prog=f"maskcf {name}", **options))


def _options(kind: type, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every option and its type."""
    for field, hint in get_type_hints(kind).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _options(hint, f"{prefix}{field.replace('_', '-')}.")
        else:
            yield f"{prefix}{field.replace('_', '-')}", hint


def _kinds(hint: Any) -> set[Any]:
    """A type and those it is made of."""
    return {hint}.union(*map(_kinds, get_args(hint)))


def _joined(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
    """The arguments with all values of an option of several where it comes first."""
    groups: list[list[str]] = [[]]
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") in lists:
            same = next((group for group in groups if group and group[0] == option.replace("_", "-")), None)
            if same is None:
                groups.append([option.replace("_", "-")])
            else:
                groups.remove(same)
                groups.append(same)
            groups[-1] += [value] if equals else []
        elif argument.startswith("--"):
            groups.append([argument])
        else:
            groups[-1].append(argument)
    return [argument for group in groups for argument in group]


def _at_home(value: Any) -> Any:
    """Settings with ``~`` expanded in every path."""
    if isinstance(value, Path):
        return value.expanduser()
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _at_home(getattr(value, field.name)) for field in fields(value)})
    return value
