"""``maskcf visualize``: a page and pictures of a fine-tuned model's maps and counterfactual images."""

from __future__ import annotations

import sys

from .core.command import command, read_settings


@command()
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    from .experiments.visualize import VisualizeConfig, visualize

    page, *pictures = visualize(read_settings(VisualizeConfig, arguments, "visualize"))
    print(f"{len(pictures)} images: open {page} in a browser; a picture of each lies beside it")


if __name__ == "__main__":
    sys.exit(main())
