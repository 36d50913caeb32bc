"""Names that a user gives: the nearest to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .errors import UserError

SHOWN = 40  # of more, only the nearest is named


def unknown(kind: str, name: object, known: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is none of those known.

    It reads ``WHERE: unknown KIND 'name' (there are …); did you mean …?``.
    """
    known = list(known)
    listed = f" (there are {', '.join(known)})" if len(known) <= SHOWN else ""
    return UserError(f"{where}{': ' if where else ''}unknown {kind} {name!r}{listed}{did_you_mean(name, known)}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for a message of one's own, or nothing where no known name is near."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
