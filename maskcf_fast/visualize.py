"""``python -m maskcf_fast.visualize``: a page and pictures of a fine-tuned model's maps and counterfactual images."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import tyro

    from .core.errors import report_errors
    from .experiments.visualize import VisualizeConfig, visualize

    config = tyro.cli(VisualizeConfig, args=arguments, prog="python -m maskcf_fast.visualize")

    def run() -> int:
        page, *pictures = visualize(config)
        print(f"{len(pictures)} images: open {page} in a browser; a picture of each lies beside it")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
