"""``python -m maskcf_fast.zeroshot``: a zero-shot head from a model's text tower."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import tyro

    from .core.errors import report_errors
    from .evaluation.zeroshot import ZeroShotConfig, write_head

    def command() -> int:
        write_head(tyro.cli(ZeroShotConfig, args=arguments, prog="python -m maskcf_fast.zeroshot"))
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
