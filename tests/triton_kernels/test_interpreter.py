"""Without a GPU: the Triton kernels' share of the ops' tests, interpreted on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these for real, where they are")
@pytest.mark.parametrize(
    ("files", "at_least"),
    [
        (("../ops/test_implementations.py", "../ops/test_generated.py"), 400),
        (("../ops/test_bias_gelu.py", "../ops/test_residual_norm.py", "test_interpreted.py"), 160),
    ],
)
def test_kernels_under_the_interpreter(files, at_least):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-x",
        "-k",
        "triton",
        *(HERE / name for name in files),
    ]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= at_least
