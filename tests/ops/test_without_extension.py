"""The contracts themselves: the tests of the ops and of the step on plain PyTorch, where the extension would run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_reference_implementations():
    names = ["ops/test_select.py", "ops/test_relevance.py", "ops/test_tokens.py", "ops/test_arguments.py", "methods"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-x", *(ROOT / "tests" / name for name in names)]
    done = subprocess.run(command, env=os.environ | {"MASKCF_NATIVE": "0"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
