"""``maskcf export``: a run's model as a checkpoint that other libraries load."""

from __future__ import annotations

import sys

from .core.command import command, read_settings


@command()
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    from .training.export import ExportConfig, export_run

    export_run(read_settings(ExportConfig, arguments, "export"))


if __name__ == "__main__":
    sys.exit(main())
