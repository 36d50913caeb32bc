"""What runs here, what does not, and why."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import maskcf_fast as mf
from maskcf_fast.ops import building, dispatch, extension
from maskcf_fast.ops.dispatch import DEVICES, resolve, why_not

CAM = torch.rand(2, 16)


def info() -> str:
    done = subprocess.run([sys.executable, "-m", "maskcf_fast.info"], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


def test_it_names_versions_the_extension_and_every_implementation():
    text = info()
    assert f"torch                  {torch.__version__}" in text
    assert str(extension.library_path()) in text
    for device, impls in DEVICES.items():
        part = text.split(f"Implementations for tensors on {device}")[1].split("Implementations")[0]
        for op in ("select", "refill", "patchify", "gather", "relevance", "bias_gelu", "residual_norm"):
            lines = [line.split(maxsplit=2) for line in part.splitlines() if line.split()[:1] == [op]]
            answers = {impl: answer for _, impl, answer in lines}
            assert set(answers) == set(impls)
            assert answers["reference"].startswith("yes")
            for dtype in (torch.float32, torch.bfloat16):
                chosen = resolve(f"maskcf_fast.ops.{op}", "auto", torch.device(device), dtype=dtype)
                assert answers[chosen].startswith("yes (auto")
            assert 1 <= sum("(auto" in answer for answer in answers.values()) <= 2


def test_it_can_be_cut_short():
    script = f"{sys.executable} -m maskcf_fast.info | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "Versions"
    assert "Traceback" not in done.stderr


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'cuda', .*got 'tritn'; did you mean 'triton'\?"):
        mf.select_patches(CAM, threshold=0.3, impl="tritn")


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_the_wrong_device(impl, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"select cannot run with impl='{impl}' on cpu: it is for tensors on cuda"):
        mf.select_patches(CAM, threshold=0.3, impl=impl)


def test_an_extension_that_is_not_built(monkeypatch):
    """Without it, "auto" goes on to the next; to ask for it is an error that says what to do."""
    monkeypatch.setattr(extension, "why_not", lambda impl, op: "the extension is not built: run the build")
    with pytest.raises(RuntimeError, match=r"impl='cpu' on cpu: the extension is not built: run the build"):
        mf.select_patches(CAM, threshold=0.3, impl="cpu")
    assert resolve("maskcf_fast.ops.select", "auto", torch.device("cpu")) == "reference"
    assert mf.select_patches(CAM, threshold=0.3).dtype == torch.bool


def test_without_triton(monkeypatch):
    real = dispatch.util.find_spec
    monkeypatch.setattr(dispatch.util, "find_spec", lambda name: None if name == "triton" else real(name))
    package, gpu = "maskcf_fast.ops.refill", torch.device("cuda")
    assert why_not(package, "triton", gpu) == "triton is not installed"
    monkeypatch.setattr(extension, "why_not", lambda impl, op: "not built")
    assert resolve(package, "auto", gpu) == "reference"


def test_a_size_that_a_kernel_lacks(monkeypatch):
    """Named when asked for; "auto" takes what can."""
    package, gpu = "maskcf_fast.ops.relevance", torch.device("cuda")
    lacks = import_module(package).lacks
    assert "float64" in lacks("triton", gpu, torch.float64, 64)
    assert lacks("triton", gpu, torch.float16, 64) is None
    monkeypatch.setattr(extension, "why_not", lambda impl, op: "not built")
    assert resolve(package, "auto", gpu, (torch.float64, 64)) == "reference"
    assert resolve(package, "auto", gpu, (torch.float16, 64)) == "triton"


def test_an_extension_of_other_sources(tmp_path):
    """As after an update: it is not loaded, since its ops may take other arguments, and everyone is told."""
    library = tmp_path / building.LIBRARY
    library.write_bytes(b"its ops take other arguments")
    script = "import torch, maskcf_fast as mf; print(mf.select_patches(torch.rand(2, 16), top_k=3).sum().item())"
    tried = {"{}": (["-c", script], "6\n"), '{"sources": "0123"}': (["-m", "maskcf_fast.info"], "no: the extension")}
    for facts, (command, answer) in tried.items():
        (tmp_path / building.FACTS).write_text(facts)
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=True,
            env={**os.environ, "MASKCF_LIBRARY": str(library)},
        )  # fmt: skip
        assert answer in done.stdout
        assert f"{library} was built from other sources" in done.stderr
        assert "python -m maskcf_fast.build" in done.stderr


def test_the_library_of_this_version_goes_before_newer_ones(tmp_path, monkeypatch):
    folders = [tmp_path / "beside", tmp_path / "cache"]
    for folder, sources in zip(folders, (building.sources_digest(), "0123"), strict=True):
        folder.mkdir()
        (folder / building.LIBRARY).touch()
        (folder / building.FACTS).write_text(json.dumps({"sources": sources}))
    monkeypatch.delenv("MASKCF_LIBRARY", raising=False)
    monkeypatch.setattr(building, "output_folders", lambda: folders)
    assert extension.library_path().parent == folders[0]
