"""Choosing an implementation by name, the same way for every op."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any


def choose(op: str, impl: str, implementations: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the implementation of ``op`` that ``impl`` names.

    ``"auto"`` takes the first entry: the mapping is ordered from the fastest to the plain reference.

    Raises:
        ValueError: ``impl`` names no implementation of this op.
    """
    if impl == "auto":
        return next(iter(implementations.values()))
    if impl in implementations:
        return implementations[impl]
    near = difflib.get_close_matches(impl, ["auto", *implementations], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(repr(name) for name in ("auto", *implementations))
    raise ValueError(f"{op} has no implementation impl={impl!r} (there are {known}){hint}")
