"""``python -m maskcf_fast.export``: a run's model as a checkpoint that other libraries load."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import tyro

    from .core.errors import report_errors
    from .training.export import ExportConfig, export_run

    def command() -> int:
        export_run(tyro.cli(ExportConfig, args=arguments, prog="python -m maskcf_fast.export"))
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
