"""``maskcf zeroshot``: a zero-shot head from a model's text tower."""

from __future__ import annotations

import sys

from .core.command import command, read_settings


@command()
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    from .evaluation.zeroshot import ZeroShotConfig, write_head

    write_head(read_settings(ZeroShotConfig, arguments, "zeroshot"))


if __name__ == "__main__":
    sys.exit(main())
