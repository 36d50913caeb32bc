"""What the benchmarks share: timing in turns, peak memory, the bandwidth of a copy, facts about the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

WARM_SECONDS = 0.2  # a call that takes longer is not run an extra time: it works on far more memory than malloc keeps
SAMPLE_SECONDS = {"cpu": 0.002, "cuda": 0.01}  # a sample is as many calls as take this long: the clock costs nothing


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is a GPU where torch can use one.

    Raises:
        ValueError: The device is neither a CPU nor a GPU that torch can use here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in SAMPLE_SECONDS:
        raise ValueError(f"the benchmarks run on cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: torch {torch.__version__} finds no GPU; use --device cpu")
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as the system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as a folder: ``"NVIDIA H100 80GB HBM3"`` becomes ``"nvidia-h100-80gb-hbm3"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
        "platform": platform.platform(),
        "versions": versions,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds per call, over ``repeats`` calls in a row; results are dropped as they come."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 31),
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

    Returns:
        Seconds per call by name, one value per round: values at the same place come from the same round.
    """
    end = time.perf_counter() + seconds
    first = {name: timed(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if device.type == "cpu":
                trim_memory()
                if first[name] < WARM_SECONDS:
                    call()
            repeats = int(SAMPLE_SECONDS[device.type] / max(first[name], 1e-7))
            samples[name].append(timed(call, device, min(max(repeats, 1), 1000)))
    return samples


def spread(samples: list[float]) -> float:
    """The interquartile range; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of one variant's time by another's of the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def copies(total: int, device: torch.device) -> dict[str, Callable[[], Any]]:
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


def copy_bandwidth(device: torch.device, total: int = 1 << 28, seconds: float = 1.0) -> dict[str, float]:
    """GB/s, read and written together, of each of `copies`."""
    samples = interleaved(copies(total, device), device, seconds=seconds)
    return {name: total / statistics.median(times) / 1e9 for name, times in samples.items()}


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _from_proc("/proc/meminfo", "MemAvailable")


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
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
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None
