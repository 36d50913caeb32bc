"""The wheel, installed where the source tree is not: it carries the library, and its ops run.

Builds for a minute, so it runs when asked: ``MASKCF_TEST_BUILD=1``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from test_base_install import LIBRARY, hide_all_but_the_base

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("MASKCF_TEST_BUILD"), reason="MASKCF_TEST_BUILD is not set")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that nothing that lies about in it gets in."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "maskcf_fast"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=tree, MASKCF_BUILD="cpu")
    (path,) = out.glob("*.whl")
    return path


def test_it_is_for_every_python_and_carries_library_and_sources(wheel):
    assert re.fullmatch(r"maskcf_fast-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "_build/libmaskcf.so",
        "_csrc/refill.cu",
        "_csrc/core/select.h",
        "configs/object-single.yaml",
        "ops/tuning.json",
        "py.typed",
    ):
        assert f"maskcf_fast/{wanted}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]


def test_its_ops_run_in_an_environment_without_the_source_tree(wheel, tmp_path):
    """An empty environment gets the wheel; what the wheel depends on comes from this one."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # Behind the wheel on the path. A plain path entry: the .pth files in it, an editable install's too, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(
        ROOT / "tests" / "ops", tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__", "test_large*")
    )
    environment = {"PYTHONPATH": ""}
    text = run(python, "-m", "maskcf_fast.info", cwd=tmp_path, **environment)
    assert str(packages / "maskcf_fast" / "_build") in text
    assert re.search(r"refill +cpu +yes \(auto\)", text)
    where = run(python, "-c", "import maskcf_fast; print(maskcf_fast.__file__)", cwd=tmp_path, **environment)
    assert Path(where.strip()).is_relative_to(packages)
    # The base dependencies alone: what else is installed is hidden.
    assert run(python, "-c", hide_all_but_the_base() + LIBRARY, cwd=tmp_path, **environment).startswith("True")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "ops/test_implementations.py", "-k", "cpu and eager")
    done = run(python, *command, cwd=tmp_path, **environment)
    assert int(re.search(r"(\d+) passed", done)[1]) > 300
