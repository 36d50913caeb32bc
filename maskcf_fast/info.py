"""``maskcf info``: what is installed, and which implementation of each op runs here."""

from __future__ import annotations

import argparse
import sys

from . import __version__
from .core.command import command
from .ops.info import describe


@command()
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    argparse.ArgumentParser(
        prog="maskcf info", description="Say what is installed, and which implementation of each op runs here."
    ).parse_args(arguments)
    print(describe(__version__))


if __name__ == "__main__":
    sys.exit(main())
