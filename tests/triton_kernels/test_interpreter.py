"""Runs the tests of test_interpreted.py where Triton interprets its kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_under_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-x",
        Path(__file__).with_name("test_interpreted.py"),
    ]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
