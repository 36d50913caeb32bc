"""Running the tests of the ops in a process of their own, with an interpreter and a library of our choice."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    python: str,
    library: Path,
    select: str,
    *more: str,
    files: Sequence[str] = ("tests/ops/test_implementations.py",),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Those in ``files`` that ``select`` names; ``more`` goes to pytest too."""
    return subprocess.run(
        [python, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *files, "-k", select, *more],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "MASKCF_LIBRARY": str(library), "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def assert_passed(done: subprocess.CompletedProcess[str], at_least: int) -> None:
    """So many of them ran, and none failed."""
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert int(re.search(r"(\d+) passed", text).group(1)) >= at_least, text[-1000:]
