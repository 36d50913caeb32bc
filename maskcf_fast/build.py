"""``maskcf build``: compile the extension against the installed PyTorch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .core.command import command
from .ops.building import LIBRARY, build, output_folder


@command()
def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="maskcf build", description="Compile the extension against the installed PyTorch."
    )
    parser.add_argument("--cpu", action="store_true", help="leave the CUDA part out")
    parser.add_argument("--sanitize", action="store_true", help="CPU part with address and undefined sanitizers")
    parser.add_argument("--out", type=Path, help="folder for the library (default: beside the package)")
    options = parser.parse_args(arguments)
    facts = build(options.out, want="cpu" if options.cpu else None, sanitize=options.sanitize)
    if not facts["cpu"]:
        return 1
    print(f"built {(options.out or output_folder()) / LIBRARY} in {facts['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
