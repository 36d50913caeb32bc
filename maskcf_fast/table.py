"""``python -m maskcf_fast.table``: every method of the paper, fine-tuned and measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import tyro

    from .core.errors import CONTINUES, report_errors
    from .core.processes import Processes
    from .experiments.table import Table, TableConfig

    def run() -> int:
        config: Any = tyro.cli(TableConfig, args=arguments, prog="python -m maskcf_fast.table")
        processes = Processes.start("cpu" if config.demo else config.device)
        try:
            text = Table(config, processes).run()
        finally:
            processes.stop()
        if processes.main:
            print(f"\n{text}\n\ntable.md, table.json, tradeoff.png, results.json: {config.out}")
        return 0

    return report_errors(run, CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
