"""``maskcf evaluate``: accuracy of fine-tuned models on any number of test sets."""

from __future__ import annotations

import sys

from .core.command import command, read_settings
from .core.errors import CONTINUES


@command(CONTINUES)
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    from .core.processes import Processes
    from .experiments.evaluate import EvaluateConfig, Evaluation

    config = read_settings(EvaluateConfig, arguments, "evaluate")
    processes = Processes.start(config.device)
    try:
        Evaluation(config, processes).run()
    finally:
        processes.stop()


if __name__ == "__main__":
    sys.exit(main())
