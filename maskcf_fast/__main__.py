"""``maskcf COMMAND …``, the same as ``python -m maskcf_fast.COMMAND …``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .core.names import unknown

MODULES = {
    name: f"maskcf_fast.{name}"
    for name in ("train", "evaluate", "table", "demo", "zeroshot", "export", "visualize", "explain", "info", "build")
}
MODULES["explain"] += ".__main__"  # a package, for it is an API too


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in MODULES:
        return import_module(MODULES[name]).main(rest)
    if name == "--version":
        print(f"maskcf_fast {__version__}")
        return 0
    if name in ("-h", "--help"):
        print("usage: maskcf COMMAND …   (--help after a command lists its options)\n")
        for name, module in MODULES.items():
            what = (import_module(module).__doc__ or "").partition(": ")[2].partition("\n")[0]
            print(f"  {name:<10} {what}")
        return 0
    print(f"error: {unknown('command', name, MODULES)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
