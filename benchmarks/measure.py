"""What the benchmarks share: timing in turns, peak memory, plain copies, facts about the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from maskcf_fast.core.errors import UserError

WARM_SECONDS = 0.2  # a call that takes longer is not run an extra time: it works on far more memory than malloc keeps
SAMPLE_SECONDS = {"cpu": 0.002, "cuda": 0.01}  # a sample is as many calls as take this long: the clock costs nothing

Call = Callable[[], Any]


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is a GPU where torch can use one.

    Raises:
        UserError: The device is neither a CPU nor a GPU that torch can use here.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type not in SAMPLE_SECONDS:
        raise UserError(f"the benchmarks run on cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} is not available: torch {torch.__version__} finds no GPU; use --device cpu")
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as the system gives it, with the instructions that PyTorch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            name = found[1].strip()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads, how busy the machine is, and the command of this process."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if device.type == "cuda":
        versions["CUDA of torch"] = str(torch.version.cuda)
    return {
        "device": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # processes that wanted a core in the last minute
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        # As anyone would type it: of an absolute path, which only this machine has, the name.
        "command": shlex.join(["python", *(re.sub(r"(^|=)/.*/", r"\1", word) for word in sys.orig_argv[1:])]),
    }


def first_line(reason: object) -> str:
    """The first line that says something; of an error without words, its kind."""
    lines = (line.strip() for line in str(reason).splitlines())
    return next((line[:200] for line in lines if line), type(reason).__name__)


def progress(line: str) -> None:
    """Tell how far a measurement is."""
    print(line, file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds per call, over ``repeats`` calls in a row; results are dropped as they come."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def timed_cold(call: Call) -> float:
    """Seconds per call on a GPU whose cache holds none of its data, by Triton's timer."""
    from triton.testing import do_bench

    return 1e-3 * do_bench(call, warmup=1, rep=1e3 * SAMPLE_SECONDS["cuda"], return_mode="median")


def rounds_until(end: float, bounds: tuple[int, int]) -> Iterator[int]:
    """Count rounds until ``end`` (of `time.perf_counter`), at least and at most as many as ``bounds``."""
    for done in range(bounds[1]):
        if done >= bounds[0] and time.perf_counter() > end:
            return
        yield done


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 31),
    cold: bool = False,
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Time several calls in turns, so that whatever else the machine does falls on all of them.

    On a CPU, each is measured as in a loop of its own: before its turn, what malloc kept from the others is given
    back, and the call runs once. Else some results would be written to memory that is there and others to memory
    that the system must first hand out, at several times the cost, depending on who came before.

    Args:
        calls: The calls by name. Each has run before: compiled, tuned.
        device: Where they run.
        seconds: Time to spend; the rounds end early, but never before the first bound of ``rounds``.
        rounds: Fewest and most rounds.
        cold: On a GPU, empty its cache before each call: what is measured is the memory's speed, as within a step.
        failed: Takes the reason, by name, of a call that fails (out of memory beside the others, say): it takes no
            more turns, and keeps the times it has. Without it the error is raised.

    Returns:
        Seconds per call by name, one value per round: values at the same place come from the same round.
    """
    end = time.perf_counter() + seconds
    cold = cold and device.type == "cuda" and util.find_spec("triton") is not None
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def sample(name: str, call: Call) -> None:
        if name not in repeats:  # a first time, that is not counted
            once = timed(call, device)
            repeats[name] = min(max(int(SAMPLE_SECONDS[device.type] / max(once, 1e-7)), 1), 1000)
            if once < WARM_SECONDS:
                warm.add(name)
            return
        if device.type == "cpu":
            trim_memory()
            if name in warm:
                call()
        samples[name].append(timed_cold(call) if cold else timed(call, device, repeats[name]))

    warm: set[str] = set()
    left = dict(calls)
    for _ in rounds_until(end, (rounds[0] + 1, rounds[1] + 1)):
        for name, call in list(left.items()):
            try:
                sample(name, call)
            except RuntimeError as error:
                if failed is None:
                    raise
                failed[name] = first_line(error)
                del left[name]
    return samples


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range (0 of a single sample) in milliseconds."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (0.0, 0.0, 0.0)
    return {"ms": 1e3 * statistics.median(times), "iqr_ms": 1e3 * (high - low)}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds, as many as both have, of one variant's time by another's of the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=False))


def copies(total: int, device: torch.device) -> dict[str, Call]:
    """Plain copies that move ``total`` bytes, half of them read, half written.

    ``"copy"`` writes a new tensor, as an op does; ``"copy in place"`` one that is there, which shows the memory's
    bandwidth. On a CPU the difference is what the system takes to hand out memory; a GPU's allocator keeps it.
    """
    source = torch.ones(max(total // 2, 1), dtype=torch.uint8, device=device)
    there = source.clone()
    return {
        "copy": lambda: torch.empty_like(source).copy_(source),
        "copy in place": lambda: there.copy_(source),
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be allocated; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _from_proc("/proc/meminfo", "MemAvailable")


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes in use at the highest point of a call, its result included, above what was in use before.

    On a GPU as torch's allocator counts them. On a CPU by the high-water mark of the process's resident memory,
    to about a megabyte; None where the system (not Linux) cannot reset it.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim_memory()  # memory that malloc kept from earlier calls would be used again without being seen
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before_call = _from_proc("/proc/self/status", "VmRSS")
    call()
    peak = _from_proc("/proc/self/status", "VmHWM")
    return max(0, peak - before_call) if peak is not None and before_call is not None else None


def trim_memory() -> None:
    """Give back to the system the memory that malloc keeps for later; nothing where it is not glibc's."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _from_proc(path: str, name: str) -> int | None:
    """A field of a file in /proc that counts kilobytes, in bytes."""
    with suppress(OSError):
        if found := re.search(rf"^{name}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE):
            return int(found[1]) << 10
    return None
