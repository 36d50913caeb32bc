"""``maskcf demo``: the method on embedded data, compared with its neighbours."""

from __future__ import annotations

import sys

from .core.command import command, read_settings
from .core.errors import CONTINUES


@command(CONTINUES)
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    import torch

    from .experiments.demo import Demo, DemoConfig

    config = read_settings(DemoConfig, arguments, "demo")
    config.validate()
    if config.threads:
        torch.set_num_threads(config.threads)
    Demo(config).run()


if __name__ == "__main__":
    sys.exit(main())
