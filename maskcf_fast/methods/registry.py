"""The methods by their names. A module beside this one that registers a method is found by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..core.names import unknown
from ..models import ImageClassifier
from .method import Method


class Entry(NamedTuple):
    """How a method is built from a student and settings."""

    build: Callable[..., Method]
    about: str  # one sentence for --help
    reads: tuple[str, ...]  # the settings that it is built from
    fsdp: bool  # whether its parameters may be divided among processes

    @property
    def masks(self) -> bool:
        """Whether it has a masking strategy."""
        return "strategy" in self.reads

    @property
    def distils(self) -> bool:
        """Whether it has a teacher, which may follow the student."""
        return "ema_teacher" in self.reads


class Registry(dict[str, Entry]):
    """A dictionary that names the nearest of its keys where one is missing."""

    def __missing__(self, name: str) -> Entry:
        raise unknown("method", name, self)


METHODS = Registry()


def register(name: str, *reads: str, fsdp: bool = True) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Make what a function builds a method called ``name``; its docstring is the line in --help.

    Args:
        name: What users call it.
        reads: Settings that the function takes by name, beside the student; those that are None are not given.
            ``ema_teacher`` says that the teacher may follow the student, which is the trainer's to do.
        fsdp: False, if it needs whole parameters.
    """

    def add(build: Callable[..., Method]) -> Callable[..., Method]:
        METHODS[name] = Entry(build, build.__doc__ or "", reads, fsdp)
        return build

    return add


def build_method(name: str, student: ImageClassifier, settings: Mapping[str, Any]) -> Method:
    """A method on a student as it is now, of which its teacher is a copy.

    Raises:
        ValueError: Unknown method (the nearest is suggested), or settings that do not fit it.
    """
    entry = METHODS[name]
    given = {key: settings[key] for key in entry.reads if key != "ema_teacher" and settings.get(key) is not None}
    return entry.build(student, **given)
