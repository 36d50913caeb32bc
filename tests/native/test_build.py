"""The extension as a file: built with sanitizers, loaded by another PyTorch, and what its GPU code looks like.

These compile for half a minute or more each, so they run when asked: ``MASKCF_TEST_BUILD=1``. The other PyTorch is
named by ``MASKCF_TEST_OTHER_PYTHON``, an interpreter that has one and pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from maskcf_fast.ops import building

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("MASKCF_TEST_BUILD"), reason="MASKCF_TEST_BUILD is not set")
# One case of everything that walks memory: odd sizes, both layouts, every access width, all instruction sets' tails.
SANITIZED = (
    "test_masks_are_identical or test_refill_is_exact or test_patchify_is_exact or test_gather_is_exact or "
    "test_select_and_refill or (test_relevance_errs and not L14 and not t4097) or test_a_nan or test_a_donor"
)


def pytest_with(python: str, library: Path, select: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the ops' tests in a process of their own, with a library of our choice."""
    return subprocess.run(
        [python, "-m", "pytest", "-q", "-x", "-s", "--noconftest", "-p", "no:cacheprovider",
         "tests/ops/test_implementations.py", "-k", select],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "MASKCF_LIBRARY": str(library), "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def assert_passed(done: subprocess.CompletedProcess, at_least: int) -> None:
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert int(re.search(r"(\d+) passed", text).group(1)) >= at_least, text[-1000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The CPU part, built from the tree."""
    folder = tmp_path_factory.mktemp("plain")
    assert building.build(folder, want="cpu")["cpu"]
    return folder / building.LIBRARY


def test_no_symbol_of_pytorchs_cxx_interface_or_of_python(plain):
    """Only C functions with a stable name are taken from PyTorch, and none from Python."""
    wanted = subprocess.run(["nm", "-D", "--undefined-only", plain], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1].split("@")[0] for line in wanted.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch)|Py|_Py", name)]


def test_a_compilers_error_is_told_and_recorded(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    said: list[str] = []
    facts = building.build(tmp_path / "out", want="cpu", say=said.append)
    assert facts["cpu"] is None
    assert "no such header" in facts["why_no_cpu"]
    assert "no such header" in "\n".join(said)
    assert not (tmp_path / "out" / building.LIBRARY).exists()


def test_nothing_is_built_when_switched_off(tmp_path):
    assert "MASKCF_BUILD=none" in building.build(tmp_path, want="none")["why_no_cpu"]


def test_under_sanitizers(tmp_path):
    facts = building.build(tmp_path, want="cpu", sanitize=True)
    assert facts["cpu"], facts
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")  # the last: else exceptions are not intercepted
    ]
    done = pytest_with(
        sys.executable, tmp_path / building.LIBRARY, f"cpu and eager and ({SANITIZED}) or (test_masks and cpu)",
        LD_PRELOAD=":".join(runtime), ASAN_OPTIONS="detect_leaks=0:alloc_dealloc_mismatch=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip
    assert_passed(done, 200)


@pytest.mark.skipif(not os.environ.get("MASKCF_TEST_OTHER_PYTHON"), reason="MASKCF_TEST_OTHER_PYTHON is not set")
def test_loads_under_another_pytorch():
    """The library that is installed, GPU part included if it has one."""
    from maskcf_fast.ops import extension

    other = os.environ["MASKCF_TEST_OTHER_PYTHON"]
    version = subprocess.run(
        [other, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert version != torch.__version__
    assert_passed(pytest_with(other, extension.library_path(), "cpu and eager"), 300)


@pytest.fixture(scope="module")
def cuda_report() -> dict[str, list[dict]]:
    """Per architecture, the kernels with their registers, spills and widest accesses."""
    from native_report import find_cuobjdump, report

    try:
        building.find_nvcc()
    except building.BuildError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as folder:
        return report(Path(folder), find_cuobjdump())


def test_gpu_kernels_do_not_spill(cuda_report):
    assert set(cuda_report) >= {"sm_80", "sm_90", "sm_100"}
    for arch, kernels in cuda_report.items():
        assert len(kernels) > 20, arch
        for kernel in kernels:
            assert kernel["spill_stores"] == kernel["spill_loads"] == 0, (arch, kernel)
            assert kernel["registers"] <= 168, (arch, kernel)


@pytest.mark.parametrize("name", ["refill_kernel<uint4", "gather_kernel<uint4"])
def test_copies_use_16_byte_accesses(cuda_report, name):
    for arch, kernels in cuda_report.items():
        copies = [kernel for kernel in kernels if name in kernel["name"]]
        assert copies, arch
        for kernel in copies:
            assert (kernel["load_bytes"], kernel["store_bytes"]) == (16, 16), (arch, kernel)


def test_half_relevance_is_on_tensor_cores(cuda_report):
    for arch, kernels in cuda_report.items():
        for kernel in kernels:
            if re.match(r"(softmax|columns)_kernel<", kernel["name"]):
                assert kernel["tensor_cores"] == ("float" not in kernel["name"].split(",")[0]), (arch, kernel)
