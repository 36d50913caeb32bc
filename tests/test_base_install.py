"""What runs with the base dependencies alone, and what the rest says then; and that importing the package is quick."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import maskcf_fast as mf
from maskcf_fast import ops
from maskcf_fast.__main__ import MODULES

BASE = ("torch", "triton", "numpy", "safetensors")
ROOMS = ("data", "evaluation", "experiments", "training:Trainer", "visualization")  # or what of one needs more

# Finds nothing but the standard library, the package, and the base distributions with what they depend on.
ONLY_BASE = """
import sys
from importlib import machinery
allowed = set({allowed!r})
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in allowed | sys.stdlib_module_names or name.startswith("_sysconfigdata"):
            return machinery.PathFinder.find_spec(name, path, target)
sys.meta_path = [f for f in sys.meta_path if f is not machinery.PathFinder and "editable" not in repr(f)] + [Finder]
"""

LIBRARY = """
import copy, torch
import maskcf_fast as mf
model = mf.VisionTransformer(mf.VisionTransformerConfig(8, 2, width=16, depth=2, heads=2, output_dim=8))
student = mf.ImageClassifier(model, mf.CosineClassifier(8, num_classes=3))
images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
step = mf.CounterfactualDistiller(student, copy.deepcopy(model), "object-single")(images, labels)
step.loss.backward()
cam = mf.explain(student, images, labels)
refilled, mask = mf.counterfactual_refill(images, cam, mf.sample_donors(4), threshold=0.3)
print(torch.isfinite(step.loss).item(), list(cam.shape), list(refilled.shape))
"""


def closure(*names: str) -> set[str]:
    """Distributions and all that they depend on, as installed here."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


def hide_all_but_the_base() -> str:
    """Python code that hides every library outside the base."""
    base = closure(*BASE)
    owners = metadata.packages_distributions()
    allowed = {module for module, names in owners.items() if {re.sub(r"[-_.]+", "-", n).lower() for n in names} & base}
    hidden = {"PIL", "tyro", "yaml", "tqdm", "matplotlib", "sklearn", "tensorboard", "timm"}
    assert not hidden & allowed
    return ONLY_BASE.format(allowed=sorted(allowed | {"maskcf_fast"}))


only_base = pytest.fixture(scope="module")(hide_all_but_the_base)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_ops_step_and_explanation_need_the_base_alone(only_base):
    assert run(only_base + LIBRARY) == "True [4, 16] [4, 3, 8, 8]"


def test_what_needs_more_names_the_command_that_installs_it(only_base):
    """Every room and every command; those that report on the installation run."""
    text = run(
        f"""{only_base}
import io
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
for room in {ROOMS}:
    try:
        module, _, name = room.partition(":")
        getattr(import_module("maskcf_fast." + module), name or "__name__")
    except ModuleNotFoundError as error:
        print(room, "->", error)
from maskcf_fast.__main__ import main
for name in {sorted(MODULES)}:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        try:
            code = main([name] + ["--help"] * (name != "info"))
        except SystemExit as end:
            code = end.code
    print(name, "->", code, said.getvalue().strip())
"""
    )
    said = dict(line.split(" -> ") for line in text.splitlines())
    assert set(said) == {*ROOMS, *MODULES}
    for name, text in said.items():
        if name in ("build", "info"):
            assert text.strip() == "0"
        else:
            assert re.fullmatch(r"(1 error: )?\w+ is not installed: pip install 'maskcf-fast\[train\]'", text), name


def test_the_package_exports_the_ops_in_a_list_that_type_checkers_read():
    tree = ast.parse(Path(mf.__file__).read_text())
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)]
    assert [ast.literal_eval(value) for value in assigned] == [mf.__all__]
    assert set(ops.__all__) <= set(mf.__all__) <= set(dir(mf))


def test_import_loads_nothing_heavy():
    loaded = run(
        "import sys, torch; before = set(sys.modules); import maskcf_fast.explain; new = set(sys.modules) - before;"
        "print(sorted({name.split('.')[0] for name in new}), torch.cuda.is_initialized())"
    )
    assert loaded.endswith("False")
    assert "'maskcf_fast'" in loaded
    others = ("timm", "transformers", "open_clip", "torchvision", "PIL")
    for heavy in ("nvidia", "triton", "matplotlib", "sklearn", "tensorboard", "tyro", *others):
        assert f"'{heavy}'" not in loaded


def test_import_costs_less_than_a_second_more_than_torch():
    code = "import time, torch; start = time.perf_counter(); import maskcf_fast; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(3)) < 1.0
