"""``maskcf explain``: heat maps for a folder of images, with a model of another library."""

from __future__ import annotations

import sys

from ..core.command import command, read_settings


@command()
def main(arguments: list[str]) -> None:
    """Run the command; returns the exit code."""
    from .gallery import GalleryConfig, draw_gallery

    *pictures, sheet = draw_gallery(read_settings(GalleryConfig, arguments, "explain"))
    print(f"{len(pictures)} images explained: {sheet}")


if __name__ == "__main__":
    sys.exit(main())
