"""``python -m maskcf_fast.demo``: the method on embedded data, compared with its neighbours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import torch
    import tyro

    from .core.errors import CONTINUES, report_errors
    from .experiments.demo import Demo, DemoConfig

    def run() -> int:
        config: Any = tyro.cli(DemoConfig, args=arguments, prog="python -m maskcf_fast.demo")
        config.validate()
        if config.threads:
            torch.set_num_threads(config.threads)
        Demo(config).run()
        return 0

    return report_errors(run, CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
