"""What the assembler made of every GPU kernel: ``python tests/native/native_report.py`` prints the table."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from maskcf_fast.ops import building

WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1, "S8": 1, "S16": 2}


def plain_name(mangled: str) -> str:
    """The kernel's name with its template arguments, without namespaces and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void ", "", name.replace("maskcf::", "").replace("(anonymous namespace)::", ""))
    name = name.replace("torch::headeronly::", "").replace("c10::", "")
    depth = 0
    for i, character in enumerate(name):  # the parameters open outside all angle brackets
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


def resources(log: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Registers, shared memory and spills per (architecture, mangled kernel), from the report of ptxas."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    current: dict[str, Any] = {}
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(sm_\d+)", line):
            current = found.setdefault((match[2], match[1]), {"name": plain_name(match[1])})
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["spill_stores"], current["spill_loads"] = int(match[1]), int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current["shared"] = int(shared[1]) if shared else 0
    return found


def accesses(sass: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Widest global load and store, and use of tensor cores, per (architecture, mangled kernel)."""
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(
        lambda: {"load_bytes": 0, "store_bytes": 0, "tensor_cores": False}
    )
    arch = name = ""
    for line in sass.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif match := re.search(r"\b(LDG|STG)(\.\S*)", line):
            size = next((WIDTHS[part] for part in match[2].split(".") if part in WIDTHS), 4)
            key = "load_bytes" if match[1] == "LDG" else "store_bytes"
            found[arch, name][key] = max(found[arch, name][key], size)
        elif "HMMA" in line:
            found[arch, name]["tensor_cores"] = True
    return found


def find_cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that Triton brings."""
    import triton

    beside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(beside) if beside.is_file() else None)


def report(folder: Path, cuobjdump: str | None) -> dict[str, list[dict[str, Any]]]:
    """Compile the CUDA files for every architecture and read what came out."""
    table: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for job in building.cuda_jobs(building.source_folder(), building.torch_folder(), folder):
        found = resources(building.run(job))
        if cuobjdump:
            sass = subprocess.run([cuobjdump, "-sass", job[-1]], capture_output=True, text=True, check=True).stdout
            for key, facts in accesses(sass).items():
                if key in found:
                    found[key] |= facts
        for (arch, _), facts in found.items():
            table[arch].append(facts)
    return dict(table)


def main() -> None:
    """Print a table in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        table = report(Path(folder), find_cuobjdump())
    print("| kernel | arch | registers | shared | spills | load | store | tensor cores |")
    print("|---" * 8 + "|")
    for arch, kernels in table.items():
        for k in sorted(kernels, key=lambda kernel: kernel["name"]):
            spills = k["spill_stores"] + k["spill_loads"]
            cells = [f"`{k['name']}`", arch, k["registers"], k["shared"], spills, k.get("load_bytes", "?")]
            cells += [k.get("store_bytes", "?"), "yes" if k.get("tensor_cores") else ""]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
