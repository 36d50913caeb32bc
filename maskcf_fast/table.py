"""``maskcf table``: every method of the paper, fine-tuned and measured."""

from __future__ import annotations

import sys

from .core.command import command, read_settings
from .core.errors import CONTINUES


@command(CONTINUES)
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    from .core.processes import Processes
    from .experiments.table import Table, TableConfig

    config = read_settings(TableConfig, arguments, "table")
    processes = Processes.start("cpu" if config.demo else config.device)
    try:
        text = Table(config, processes).run()
    finally:
        processes.stop()
    if processes.main:
        print(f"\n{text}\n\ntable.md, table.json, tradeoff.png, results.json: {config.out}")


if __name__ == "__main__":
    sys.exit(main())
