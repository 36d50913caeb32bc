"""The extension as a file: built with sanitizers, loaded by another PyTorch, and what its GPU code looks like.

These compile for half a minute or more each, so they run when asked: ``MASKCF_TEST_BUILD=1``. The other PyTorch is
that of ``MASKCF_TEST_LOWEST_PYTHON``, an interpreter with the lowest versions that pyproject.toml states, and pytest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import ops_tests
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from maskcf_fast.ops import building

pytestmark = pytest.mark.skipif(not os.environ.get("MASKCF_TEST_BUILD"), reason="MASKCF_TEST_BUILD is not set")
# One case of everything that walks memory: odd sizes, both layouts, every access width, all instruction sets' tails.
SANITIZED = (
    "test_masks_are_identical or test_refill_is_exact or test_patchify_is_exact or test_gather_is_exact or "
    "test_select_and_refill or (test_relevance_errs and not L14 and not t4097) or test_a_nan or test_a_donor "
    "or test_value_and_gradients"
)


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
    assert facts["failed"] == "cpu"
    assert "no such header" in facts["why_no_cpu"]
    assert "no such header" in "\n".join(said)
    assert not (tmp_path / "out" / building.LIBRARY).exists()


def build_command(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maskcf_fast.build", "--out", out]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture
def fake_compilers(tmp_path):
    """A C++ compiler that takes no time, and an nvcc that fails."""
    for name, script in {
        "c++": 'while [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done; [ $# -eq 0 ] || echo compiled > "$2"',
        "nvcc": "echo 'nvcc fatal: no such GPU' >&2; exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return {"CXX": str(tmp_path / "c++"), "MASKCF_NVCC": str(tmp_path / "nvcc")}


def test_a_part_that_fails_is_a_failure_of_the_command(tmp_path, fake_compilers):
    done = build_command(tmp_path / "out", **fake_compilers)
    assert done.returncode == 1
    assert "the CUDA part failed: nvcc failed on" in done.stdout
    assert "no such GPU" in done.stdout
    facts = building.facts_of(tmp_path / "out")
    assert facts["cpu"]
    assert facts["failed"] == "cuda"
    assert not building.is_current(tmp_path / "out", "auto")


def test_an_nvcc_that_is_absent_is_no_failure(tmp_path, fake_compilers):
    done = build_command(
        tmp_path / "out", CXX=fake_compilers["CXX"], PATH="/usr/bin:/bin", CUDA_HOME=str(tmp_path), MASKCF_NVCC=""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the CUDA part is left out: no nvcc was found" in done.stdout


def test_a_current_library_is_not_built_again(plain, tmp_path, monkeypatch):
    """Current: of these sources, flags and architectures, with the parts that can be had; and it loads."""
    library = tmp_path / "out" / building.LIBRARY
    shutil.copytree(plain.parent, library.parent)
    before = library.stat().st_mtime_ns
    cpu = {"MASKCF_BUILD": "cpu", "CXX": "/bin/false"}  # whoever compiles fails
    done = build_command(library.parent, **cpu)
    assert done.returncode == 0, done.stdout
    assert "is current" in done.stdout
    assert library.stat().st_mtime_ns == before
    assert build_command(library.parent, **cpu, MASKCF_CUDA_ARCHS="86").returncode == 1  # others' architectures
    library.write_bytes(b"no library")
    assert build_command(library.parent, **cpu).returncode == 1

    facts = building.facts_of(plain.parent)
    assert building.is_current(plain.parent, "cpu")
    monkeypatch.setenv("MASKCF_NVCC", "/somewhere/nvcc")
    assert not building.is_current(plain.parent, "auto")  # a CUDA part can be had
    (plain.parent / building.FACTS).write_text(json.dumps(facts | {"cuda": True}))
    assert building.is_current(plain.parent, "auto")
    assert not building.is_current(plain.parent, "cpu")
    monkeypatch.setattr(building, "source_folder", lambda: tmp_path)
    assert not building.is_current(plain.parent, "auto")  # other sources
    (plain.parent / building.FACTS).write_text(json.dumps(facts))


def test_nothing_is_built_when_switched_off(tmp_path):
    facts = building.build(tmp_path, want="none")
    assert "MASKCF_BUILD=none" in facts["why_no_cpu"]
    assert not facts["failed"]


def test_under_sanitizers(tmp_path):
    facts = building.build(tmp_path, want="cpu", sanitize=True)
    assert facts["cpu"], facts
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")  # the last: else exceptions are not intercepted
    ]
    done = ops_tests.run(
        sys.executable, tmp_path / building.LIBRARY, f"cpu and eager and ({SANITIZED}) or (test_masks and cpu)",
        "tests/ops/test_bias_gelu.py", LD_PRELOAD=":".join(runtime),
        ASAN_OPTIONS="detect_leaks=0:alloc_dealloc_mismatch=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip
    ops_tests.assert_passed(done, 200)


@pytest.fixture(scope="module")
def lowest() -> str:
    """An interpreter with the lowest versions that pyproject.toml states, another PyTorch among them."""
    python = os.environ.get("MASKCF_TEST_LOWEST_PYTHON")
    if not python:
        pytest.skip("MASKCF_TEST_LOWEST_PYTHON is not set")
    return python


def test_versions_are_the_lowest_stated(lowest):
    """Of everything that the package, its commands and its export to ONNX need."""
    project = tomllib.loads((ops_tests.ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated = {}
    for requirement in map(Requirement, project["dependencies"] + extras["train"] + extras["onnx"]):
        if requirement.marker is None or requirement.marker.evaluate():
            (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
            stated[requirement.name] = Version(bound)
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    found = subprocess.run([lowest, "-c", code, *stated], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(stated, map(Version, found), strict=True)) == stated


def test_ops_and_step_under_the_lowest_versions(lowest):
    """With the library that is installed, GPU part included if it has one."""
    from maskcf_fast.ops import extension

    done = ops_tests.run(
        lowest, extension.library_path(), "not triton", "--ignore-glob=*test_large*", "--ignore-glob=*test_registry*",
        files=("tests/ops", "tests/methods"),
    )  # fmt: skip
    ops_tests.assert_passed(done, 1000)


def test_commands_under_the_lowest_versions(lowest):
    """Pictures by both readers, training, TensorBoard, evaluation, the table, the demo, pages and ONNX."""
    from maskcf_fast.ops import extension

    files = (
        *(f"tests/data/test_{name}.py" for name in ("dali", "every_sample", "images", "odd_pictures")),
        *(f"tests/evaluation/test_{name}.py" for name in ("evaluate_command", "metrics")),
        "tests/experiments",
        "tests/training/test_command.py",
        "tests/training/test_export.py::test_onnx",
        "tests/training/test_recovery.py::test_tensorboard_shows_a_step_once",
        "tests/training/test_trainer.py::test_resume_is_exact",
    )
    select = "not several_processes and (not resume_is_exact or 3-object-single) and (not onnx or cosine)"
    done = ops_tests.run(lowest, extension.library_path(), select, files=files)
    ops_tests.assert_passed(done, 380)


def test_triton_kernels_under_the_lowest_triton(lowest):
    files = ["tests/triton_kernels/test_interpreted.py"]
    done = ops_tests.run(lowest, Path("none"), "not t197 and not t129", files=files, TRITON_INTERPRET="1")
    ops_tests.assert_passed(done, 80)


def test_a_library_built_under_the_lowest_pytorch(lowest, tmp_path):
    """The GPU part, too, compiles against its headers; the library serves there and here."""
    command = [lowest, "-m", "maskcf_fast.build", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ops_tests.ROOT), "MASKCF_CUDA_ARCHS": "90"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        building.find_nvcc()
        assert building.facts_of(tmp_path)["cuda"]
    except building.BuildError as error:
        assert "the CUDA part is left out" in done.stdout, error  # noqa: PT017
    for python in (lowest, sys.executable):
        ops_tests.assert_passed(ops_tests.run(python, tmp_path / building.LIBRARY, "cpu and eager"), 300)


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


@pytest.mark.parametrize("name", ["refill_kernel<uint4, false", "refill_kernel<uint4, true", "gather_kernel<uint4"])
def test_copies_use_16_byte_accesses(cuda_report, name):
    for arch, kernels in cuda_report.items():
        copies = [kernel for kernel in kernels if name in kernel["name"]]
        assert copies, arch
        for kernel in copies:
            assert (kernel["load_bytes"], kernel["store_bytes"]) == (16, 16), (arch, kernel)


def test_patches_are_written_16_bytes_at_a_time(cuda_report):
    for arch, kernels in cuda_report.items():
        wide = [kernel for kernel in kernels if re.match(r"patchify_kernel<.*, (2|4|8)>", kernel["name"])]
        assert wide, arch
        for kernel in wide:
            assert kernel["store_bytes"] == 16, (arch, kernel)


def test_half_relevance_is_on_tensor_cores(cuda_report):
    for arch, kernels in cuda_report.items():
        for kernel in kernels:
            if re.match(r"(softmax|columns)_kernel<", kernel["name"]):
                assert kernel["tensor_cores"] == ("float" not in kernel["name"].split(",")[0]), (arch, kernel)
