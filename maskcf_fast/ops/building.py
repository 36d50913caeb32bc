"""Compiling the extension against the installed PyTorch.

The extension uses PyTorch's stable C interface alone, so one library serves every later PyTorch and every Python.
Compiling needs PyTorch's headers, which the isolated environment of ``pip install`` does not hold; hence a command
of its own (``python -m maskcf_fast.build``), and an installation that succeeds without. ``setup.py`` builds through
this same file where it can, so it imports nothing but the standard library, and nothing of this package.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path
from typing import Any

LIBRARY = "libmaskcf.so"
FACTS = "facts.json"
TORCH_TARGET = "2.11"
TARGET_MACRO = "TORCH_TARGET_VERSION=0x020b000000000000"
CUDA_ARCHS = "80;90;100"
COMPILERS = ("c++", "g++", "clang++")
PACKAGE = Path(__file__).parents[1]
# Products agree to the bit only where a multiplication and an addition stay two roundings; the kernels that are held
# to an error bound instead may contract.
CONTRACTED = ("kernels_", "relevance.cu")
X86_FLAGS = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
}
STRIP = ["-Wl,-s"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildError(Exception):
    """A part cannot be built; the text says why, in words for the user."""


class Absent(BuildError):
    """What a part needs is not here, or the part is not wanted: it is left out, and nothing failed."""


def output_folders() -> list[Path]:
    """Where a library may lie: inside the package, or in the user's cache if that is read-only."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    base = os.environ.get("MASKCF_CACHE") or os.path.join(cache, "maskcf_fast")
    return [PACKAGE / "_build", Path(base) / "extension"]


def output_folder() -> Path:
    """The first of `output_folders` that can be written to."""
    inside, cache = output_folders()
    try:
        inside.mkdir(exist_ok=True)
    except OSError:
        return cache
    return inside if os.access(inside, os.W_OK) else cache


def source_folder() -> Path:
    """The C++ sources: inside an installed package, or beside it in a source tree."""
    installed = PACKAGE / "_csrc"
    folder = installed if installed.is_dir() else PACKAGE.parent / "csrc"
    if not (folder / "ops.h").is_file():
        raise Absent(f"the C++ sources are not at {folder}")
    return folder


def torch_folder() -> Path:
    """PyTorch, in this environment or (under ``pip install``'s isolation) in the one being installed into."""
    spec = util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").is_file():
            return place
    raise Absent("no PyTorch with headers is installed here yet; run `python -m maskcf_fast.build` once one is")


def find_compiler(variable: str, *names: str) -> list[str]:
    """The compiler that an environment variable names, or the first of ``names`` on the path."""
    if own := os.environ.get(variable):
        return shlex.split(own)
    for name in names:
        if path := shutil.which(name):
            return [path]
    raise Absent(f"no {names[0]} was found on the PATH (set {variable} to name one)")


def find_nvcc() -> list[str]:
    """nvcc, on the path or under ``CUDA_HOME``."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    beside = os.path.join(home, "bin", "nvcc")
    return find_compiler("MASKCF_NVCC", "nvcc", *([beside] if os.access(beside, os.X_OK) else []))


def run(command: list[str]) -> str:
    """Run a compiler; its own words are the error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise BuildError(f"{Path(command[0]).name} failed on {Path(command[-3]).name}:\n{words[:3000]}")
    return (done.stdout + done.stderr).strip()


def version_of(command: list[str]) -> str:
    """The line of ``--version`` that carries the version."""
    lines = run([*command, "--version", "-o", os.devnull]).splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown").strip()


def torch_version(folder: Path) -> str:
    """Version of the PyTorch whose headers are used, without importing it."""
    for line in (folder / "version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split("=")[1].strip().strip("'\"")
    return "unknown"


def compile_all(jobs: list[list[str]]) -> list[str]:
    """Run compilations beside each other; ``MASKCF_JOBS`` says how many at a time."""
    workers = int(os.environ.get("MASKCF_JOBS", "0")) or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, jobs))


def cpu_jobs(source: Path, torch: Path, into: Path, sanitize: bool) -> list[list[str]]:
    """Compilations of the C++ files."""
    compiler = find_compiler("CXX", *COMPILERS)
    x86 = platform.machine() in ("x86_64", "AMD64")
    jobs = []
    for file in sorted(source.glob("*.cpp")):
        simd = next((flags for name, flags in X86_FLAGS.items() if file.stem.endswith(name)), [])
        if simd and not x86:
            continue
        contract = "fast" if file.name.startswith(CONTRACTED) else "off"
        jobs.append(
            [*compiler, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
             f"-ffile-prefix-map={source}=csrc",
             "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", f"-ffp-contract={contract}", *simd,
             *(["-DMASKCF_X86"] if x86 else []), *(SANITIZE if sanitize else []), f"-D{TARGET_MACRO}",
             "-isystem", str(torch / "include"), "-c", str(file), "-o", str(into / f"{file.stem}.o")]
        )  # fmt: skip
    return jobs


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for, such as ``["80", "90", "100"]``."""
    archs = os.environ.get("MASKCF_CUDA_ARCHS", CUDA_ARCHS).replace(",", ";").replace(".", "").split(";")
    if not all(arch.strip().rstrip("af").isdigit() for arch in archs):
        raise BuildError(f"MASKCF_CUDA_ARCHS must be like {CUDA_ARCHS!r}, got {os.environ['MASKCF_CUDA_ARCHS']!r}")
    return [arch.strip() for arch in archs]


def cuda_jobs(source: Path, torch: Path, into: Path) -> list[list[str]]:
    """Compilations of the CUDA files, with the assembler's report on every kernel."""
    nvcc = find_nvcc()
    archs = cuda_archs()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("af")
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # for GPUs yet to come
    return [
        [*nvcc, "-std=c++17", "-O3", *targets, "-Xptxas=-v", "--expt-relaxed-constexpr", "--extended-lambda",
         "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-ffp-contract=off",
         "-Xcompiler", f"-ffile-prefix-map={source}=csrc",
         f"--fmad={'true' if file.name.startswith(CONTRACTED) else 'false'}",
         f"-D{TARGET_MACRO}", "-DUSE_CUDA", "-isystem", str(torch / "include"),
         "-c", str(file), "-o", str(into / f"{file.stem}_cuda.o")]
        for file in sorted(source.glob("*.cu"))
    ]  # fmt: skip


def link(objects: list[Path], torch: Path, target: Path, cuda: bool, flags: list[str]) -> None:
    """Link against PyTorch by name only: it is in the process already when the library is loaded."""
    # libtorch.so stands for whichever of the CPU and CUDA libraries a PyTorch has.
    torch_libs = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    command = find_compiler("CXX", *COMPILERS)
    if cuda:
        root = Path(os.path.realpath(cuda_root()))
        folder = next((root / sub for sub in ("lib64", "lib", "targets/x86_64-linux/lib")
                       if (root / sub / "libcudart_static.a").is_file()), root)  # fmt: skip
        torch_libs += [f"-L{folder}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    # Written beside the target and moved: a process that has the old library mapped keeps it.
    temporary = target.with_suffix(f".{os.getpid()}")
    run([*command, "-shared", *flags, *map(str, objects), *torch_libs, "-o", str(temporary)])
    os.replace(temporary, target)


def cuda_root() -> str:
    """Folder of the CUDA toolkit, as nvcc itself reports it."""
    report = subprocess.run([*find_nvcc(), "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in report.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return line.removeprefix("#$ TOP=")
    raise BuildError("nvcc does not say where its toolkit lies")


def obstacle() -> str | None:
    """Why not even the CPU part could be built here; None if it may be tried."""
    if os.environ.get("MASKCF_BUILD") == "none":
        return "the build was switched off (MASKCF_BUILD=none)"
    try:
        source_folder(), torch_folder(), find_compiler("CXX", *COMPILERS)
    except BuildError as error:
        return str(error)
    return None


def sources_digest() -> str:
    """SHA-256, in hex, of the C++ sources: a library that was built from others has other ops."""
    source = source_folder()
    files = sorted(file for file in source.rglob("*") if file.is_file())
    parts = [repr((file.relative_to(source).as_posix(), file.read_bytes())) for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def digest(sanitize: bool = False) -> str:
    """Stands for all that decides what the library holds: the sources, the flags (this file), the architectures.

    Not for the compilers or PyTorch's headers: a library that was built elsewhere and brought along is as good.
    """
    parts = [sources_digest(), Path(__file__).read_text(), *cuda_archs(), str(sanitize)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def facts_of(folder: Path) -> dict[str, Any]:
    """What a build recorded beside the library; empty if nothing was ever built there."""
    try:
        return json.loads((folder / FACTS).read_text())
    except (OSError, ValueError):
        return {}


def is_stale(folder: Path) -> bool:
    """Whether the library that lies there was built from other sources than those of this version."""
    try:
        return facts_of(folder).get("sources") != sources_digest()
    except Absent:  # nothing to compare with
        return False


def is_current(folder: Path, want: str) -> bool:
    """Whether a build would make the library that lies there, with the parts that are wanted and can be had here."""
    facts = facts_of(folder)
    try:
        if not (folder / LIBRARY).is_file() or facts.get("digest") != digest() or facts.get("failed"):
            return False
        if facts.get("cuda") or want != "auto":
            return want == ("auto" if facts.get("cuda") else "cpu")
        find_nvcc()
    except BuildError:
        return True  # without a CUDA part, as it would be again; or nothing can be built, and this is what there is
    return False


def wanted(want: str | None = None) -> str:
    """``want``, or what ``MASKCF_BUILD`` says: ``"auto"``, ``"cpu"`` or ``"none"``."""
    want = want or os.environ.get("MASKCF_BUILD") or "auto"
    if want not in ("auto", "cpu", "none"):
        raise ValueError(f"MASKCF_BUILD must be 'auto', 'cpu' or 'none', got {want!r}")
    return want


def build(
    folder: Path | None = None, *, want: str | None = None, sanitize: bool = False, say: Any = print
) -> dict[str, Any]:
    """Build what can be built, and record what was and why the rest was not.

    Args:
        folder: Where the library and its facts go; beside the package when None.
        want: ``"auto"`` (CPU, and CUDA where nvcc is), ``"cpu"`` or ``"none"``; ``MASKCF_BUILD`` when None.
        sanitize: Compile the CPU part with the address and undefined-behaviour sanitizers, for tests.
        say: Takes lines for the user.

    Returns:
        The facts, as written to the folder. ``"failed"`` names the part, ``"cpu"`` or ``"cuda"``, that has its compiler
        here and yet could not be built; None where all that can be had is there.

    Raises:
        ValueError: ``want`` is none of those.
    """
    want = wanted(want)
    folder = folder or output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    facts: dict[str, Any] = {"torch_target": TORCH_TARGET, "cpu": None, "cuda": None, "failed": None}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if want == "none":
                raise Absent("the build was switched off (MASKCF_BUILD=none)")
            source, torch, into = source_folder(), torch_folder(), Path(scratch)
            facts |= {"sources": sources_digest(), "digest": digest(sanitize)}
            facts["torch_headers"] = torch_version(torch)
            jobs = cpu_jobs(source, torch, into, sanitize)
            facts["compiler"] = version_of([jobs[0][0]])
            say(f"compiling {len(jobs)} C++ files against PyTorch {facts['torch_headers']}")
            compile_all(jobs)
            objects = sorted(into.glob("*.o"))
            link(objects, torch, folder / LIBRARY, cuda=False, flags=SANITIZE if sanitize else STRIP)
            facts["cpu"] = True
            if want == "cpu" or sanitize:
                raise Absent("only the CPU part was asked for")
            facts |= build_cuda(source, torch, into, say)
            link(sorted(into.glob("*.o")), torch, folder / LIBRARY, cuda=True, flags=STRIP)
            facts["cuda"] = True
        except BuildError as error:
            part = "cuda" if facts["cpu"] else "cpu"
            facts[f"why_no_{part}"] = str(error)
            facts["failed"] = None if isinstance(error, Absent) else part
            name = "the CUDA part" if facts["cpu"] else "the CPU part, and with it the extension,"
            say(f"{name} {'failed' if facts['failed'] else 'is left out'}: {error}")
            if not facts["cpu"]:
                facts["why_no_cuda"] = "the extension was not built"
                (folder / LIBRARY).unlink(missing_ok=True)
    facts["seconds"] = round(time.perf_counter() - started, 1)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def build_cuda(source: Path, torch: Path, into: Path, say: Any) -> dict[str, Any]:
    """Compile the CUDA files; the facts about them."""
    jobs = cuda_jobs(source, torch, into)
    if not jobs:
        raise Absent("this version has no CUDA files")
    facts = {"cuda_compiler": version_of([jobs[0][0]]), "cuda_archs": cuda_archs()}
    say(f"compiling {len(jobs)} CUDA files for sm_{', sm_'.join(facts['cuda_archs'])}")
    compile_all(jobs)
    return facts
