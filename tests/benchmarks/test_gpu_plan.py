"""What a GPU is asked for is rehearsed here: no import, path or argument may fail there for the first time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a bare machine lacks: everything but torch, triton, numpy, safetensors, and what they bring.
BLOCKED = ("matplotlib", "PIL", "yaml", "tyro", "tqdm", "tensorboard", "sklearn", "nvidia.dali", "torchvision")


def gpu(*parts, out, **environment):
    command = [ROOT / ".ci" / "gpu", "--dry-run", *parts]
    variables = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "MINUTES": "30", "JOBS": "2"} | environment
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_tests_and_the_sanitizers_find_what_they_are_for(tmp_path):
    """Without a GPU all but a few are skipped; under the sanitizers, the selection alone and Triton's kernels too."""
    out = gpu("tests", "sanitize", out=tmp_path)
    counts = [int(line.split(" skipped")[0].split()[-1]) for line in out.splitlines() if " skipped" in line]
    assert len(counts) == 3
    assert counts[0] > 800
    assert min(counts) > 300
    assert (tmp_path / "tests.xml").is_file()
    script = (ROOT / ".ci" / "gpu").read_text()
    chosen = script.split('chosen="')[1].split('"')[0]
    files = "tests/ops/test_implementations.py"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", files, "-k", chosen]
    names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    for impl in ("cuda", "triton"):
        for op in ("masks_are_identical", "refill_is_exact", "patchify_is_exact", "gather_is_exact", "relevance_errs"):
            assert [line for line in names.splitlines() if op in line and impl in line], (op, impl)


def test_the_report_and_the_tuning_run_on_what_a_bare_machine_has(tmp_path):
    """Every check passes, and nothing beyond the base libraries is imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        f"there = lambda cls, name, *a: None if name in {BLOCKED!r} else find(name, *a)\n"
        "PathFinder.find_spec = classmethod(there)\n"
    )
    gpu("report", out=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    report = json.loads((tmp_path / "report.json").read_text())
    cells = report["step"]["cells"]
    assert len(cells) > 30
    assert all("ms" in cell for cell in cells)
    assert " passed" in report["checked"]
    assert {cell["run"] for cell in cells} == {"eager", "compiled", "compiled blocks", "graphed"}
    assert {cell["precision"] for cell in cells} == {"fp32", "tf32", "bf16"}
    assert report["breakdown"]["phases"]
    assert [step["precision"] for step in report["operations"]["steps"]] == ["bf16", "fp32"]
    assert len(report["memory"]["steps"]) == 4
    assert all(row["variants"][row["auto"]]["check"] == "ok" for row in report["ops"]["rows"])


def test_the_tuning_writes_a_table_that_the_ops_take(tmp_path):
    pytest.importorskip("triton")
    gpu("tune", out=tmp_path)
    from maskcf_fast.ops import tuning

    found = json.loads((tmp_path / "tuning.json").read_text())
    assert [row["kernel"] for row in found["tiles"]] == [row["kernel"] for row in tuning.table()["tiles"]]
    ops = {"select", "refill", "patchify", "gather", "bias_gelu", "relevance", "residual_norm"}
    assert {row["op"] for row in found["orders"]} == {None, *ops}
    assert tuning.to_json(found) == (tmp_path / "tuning.json").read_text()


def test_an_unknown_part_is_named(tmp_path):
    done = subprocess.run([ROOT / ".ci" / "gpu", "test"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown part test: tests, report, sanitize, tune" in done.stderr
