"""The CUDA kernels as a library for the CPU: ``python tests/native/emulated.py FOLDER`` builds it.

With ``MASKCF_LIBRARY=FOLDER/libmaskcf.so`` the ops then take ``impl="cuda"`` for tensors on the CPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from maskcf_fast.ops import building

HERE = Path(__file__).parent
# What is undefined ends the process, and what a kernel leaves unset is no zero.
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-ffp-contract=off",
    "-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-ftrivial-auto-var-init=pattern",
]  # fmt: skip

# Leaves out what tracing needs (it sees no kernel) and what takes minutes.
SELECT = "cuda and not compiled and not L14 and not t4097"


def build(
    folder: Path, source: Path | None = None, objects: Path | None = None, only: Sequence[str] | None = None
) -> Path:
    """Compile ``source`` (the project's own when None) into a library in ``folder``.

    ``objects`` keeps what was compiled; then ``only`` names the files to compile anew.
    """
    source, torch = source or building.source_folder(), building.torch_folder()
    compiler = building.find_compiler("CXX", *building.COMPILERS)
    files = [HERE / "emulator.cpp", *sorted(source.glob("*.cu"))]
    with tempfile.TemporaryDirectory() as scratch:
        into = objects or Path(scratch)
        into.mkdir(exist_ok=True)
        building.compile_all([
            [*compiler, *FLAGS, f"-D{building.TARGET_MACRO}", f'-DMASKCF_DEVICE_HEADER="{HERE / "emulator.h"}"',
             "-isystem", str(torch / "include"), "-x", "c++", "-c", str(file), "-o", str(into / f"{file.stem}.o")]
            for file in files
            if only is None or file.name in only
        ])  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        objects_there = sorted(into.glob("*.o"))
        building.link(objects_there, torch, folder / building.LIBRARY, cuda=False, flags=["-fsanitize=undefined"])
    (folder / building.FACTS).write_text(
        json.dumps({"cuda": True, "emulated": True, "sources": building.sources_digest()})
    )
    return folder / building.LIBRARY


def kernels(library: Path) -> dict[int, str]:
    """The kernels in it, by their addresses."""
    lines = subprocess.run(["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in lines.splitlines():
        address, kind, name = line.split(" ", 2)
        name = re.sub(r"^void |maskcf::|torch::headeronly::|c10::", "", name)
        if kind in "tTW" and re.match(r"\w+_kernel[<(]", name):
            found[int(address, 16)] = name.partition("(")[0]
    return found


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
