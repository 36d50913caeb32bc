"""What every command does: read its settings, run, and report what a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

from .errors import report_errors
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


def read_settings(kind: type[T], arguments: Sequence[str], name: str) -> T:
    """The settings of the command ``name``, every field an option; exits with the usage on a bad one."""
    need("tyro")
    import tyro

    return tyro.cli(kind, args=arguments, prog=f"maskcf {name}")
