"""Small image folders."""

from pathlib import Path

import pytest
from pictures import picture

from maskcf_fast.data import Manifest, scan_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, so that no scan finds the results of another."""
    monkeypatch.setenv("MASKCF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["dali", "torch"])
def backend(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.fixture
def make_folder(tmp_path):
    """A function that writes `{class: number of JPEGs}` and returns the root."""

    def make(counts: dict[str, int], size: tuple[int, int] = (40, 30)) -> Path:
        root = tmp_path / "images"
        for label, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(*size, seed=1000 * label + i).save(root / name / f"{i:03}.jpg", quality=90)
        return root

    return make


@pytest.fixture
def numbered(make_folder):
    """A function that makes n images of n labels of their own, so that a label identifies its image."""

    def make(n: int) -> Manifest:
        root = make_folder({"all": n})
        manifest = scan_images(root)
        return Manifest(manifest.root, tuple(map(str, range(n))), manifest.paths, tuple(range(n)))

    return make
