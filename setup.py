"""Builds the extension into a wheel or a source tree, where that is possible; all metadata is in pyproject.toml.

A part that cannot be built is left out, with a line that says why: the package works without, and
``python -m maskcf_fast.build`` builds it later.
"""

import shutil
import sys
from importlib import util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def load_builder():
    """maskcf_fast/ops/building.py, without importing the package: PyTorch may be absent here."""
    spec = util.spec_from_file_location("maskcf_build", ROOT / "maskcf_fast" / "ops" / "building.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPackage(build_py):
    """Copies the package, then adds the C++ sources and the library."""

    def run(self):
        super().run()
        package = ROOT / "maskcf_fast" if self.editable_mode else Path(self.build_lib) / "maskcf_fast"
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", package / "_csrc", dirs_exist_ok=True)
        load_builder().build(package / "_build", say=lambda line: print(f"maskcf_fast: {line}", file=sys.stderr))


class Wheel(bdist_wheel):
    """The library holds code for one platform, yet for every Python."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return ("py3", "none", "any" if self.root_is_pure else platform)


class WithLibrary(Distribution):
    """A distribution that is for one platform if the library can be built for it."""

    def has_ext_modules(self):
        return load_builder().obstacle() is None


setup(distclass=WithLibrary, cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
