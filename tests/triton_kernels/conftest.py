"""The kernels' own tests run under Triton's interpreter, in a process of their own (see test_interpreter.py)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # the cases that all implementations share
sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks

# The variable must be set before a kernel is decorated, and then no kernel can be compiled.
interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
collect_ignore = ["test_compile.py", "test_interpreter.py"] if interpreted else ["test_interpreted.py"]
