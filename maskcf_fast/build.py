"""``maskcf build``: compile the extension against the installed PyTorch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .core.command import command
from .core.files import check_writable
from .ops.building import LIBRARY, build, is_current, output_folder, wanted
from .ops.extension import load


@command()
def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="maskcf build", description="Compile the extension against the installed PyTorch."
    )
    parser.add_argument("--cpu", action="store_true", help="leave the CUDA part out")
    parser.add_argument("--sanitize", action="store_true", help="CPU part with address and undefined sanitizers")
    parser.add_argument("--out", type=Path, help="folder for the library (default: beside the package)")
    parser.add_argument("--force", action="store_true", help="compile even if the library there is current")
    options = parser.parse_args(arguments)
    folder, want = options.out or output_folder(), wanted("cpu" if options.cpu else None)
    check_writable(folder)
    if not (options.force or options.sanitize) and is_current(folder, want) and load(folder / LIBRARY) is None:
        print(f"{folder / LIBRARY} is current")
        return 0
    facts = build(folder, want=want, sanitize=options.sanitize)
    if not facts["cpu"] or facts["failed"]:
        return 1
    print(f"built {folder / LIBRARY} in {facts['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
