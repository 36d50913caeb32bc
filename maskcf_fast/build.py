"""Compile the extension against the installed PyTorch: ``python -m maskcf_fast.build``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .ops.building import LIBRARY, build, output_folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m maskcf_fast.build", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="leave the CUDA part out")
    parser.add_argument("--sanitize", action="store_true", help="CPU part with address and undefined sanitizers")
    parser.add_argument("--out", type=Path, help="folder for the library (default: beside the package)")
    options = parser.parse_args()
    facts = build(options.out, want="cpu" if options.cpu else None, sanitize=options.sanitize)
    if not facts["cpu"]:
        sys.exit(1)
    print(f"built {(options.out or output_folder()) / LIBRARY} in {facts['seconds']:.0f} s")


if __name__ == "__main__":
    main()
