"""Importing the package is quick, and loads neither DALI nor CUDA nor a compiler."""

import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import maskcf_fast; new = set(sys.modules) - before;"
        "print(sorted({name.split('.')[0] for name in new}), torch.cuda.is_initialized())"
    )
    assert loaded.endswith("False")
    assert "'maskcf_fast'" in loaded
    for heavy in ("nvidia", "triton", "matplotlib", "sklearn", "tensorboard", "tyro", "torchvision"):
        assert f"'{heavy}'" not in loaded


def test_import_costs_less_than_a_second_more_than_torch():
    seconds = min(
        float(
            run(
                "import time, torch; start = time.perf_counter(); import maskcf_fast; "
                "print(time.perf_counter() - start)"
            )
        )
        for _ in range(3)
    )
    assert seconds < 1.0
