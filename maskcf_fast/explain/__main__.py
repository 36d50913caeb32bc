"""``python -m maskcf_fast.explain``: heat maps for a folder of images, with a model of another library."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..core.errors import report_errors
from .gallery import GalleryConfig, draw_gallery


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    import tyro

    config = tyro.cli(GalleryConfig, args=arguments, prog="python -m maskcf_fast.explain")
    return report_errors(lambda: gallery(config))


def gallery(config: GalleryConfig) -> int:
    """One folder."""
    written = draw_gallery(config)
    print(f"{len(written) - 1} images explained: {written[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
