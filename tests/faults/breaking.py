"""Breaks real training runs, and sees what is lost. ``python tests/faults/breaking.py`` prints the table of all faults.

Every fault is done to the train command in processes of its own. A run survives it if the same command, with
``--resume auto``, afterwards ends with the very weights and log of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import date
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
TRAIN = ["-m", "maskcf_fast.train"]
STEPS, EPOCH = 40, 10
SAME = "the same run in the end"
SMALL = 300_000  # bytes: less than a checkpoint of the tiny model, more than all else
OWN_TRACEBACK = re.compile(r'File ".*maskcf_fast')  # torchrun prints one of its own whenever a process fails


class Broken(AssertionError):
    """What a fault led to, where it should have done no harm."""


class Bench:
    """A folder with images, an undisturbed run, and runs to be broken.

    Args:
        folder: Where all of it lies.
        processes: Processes of each run; more than one are started by torchrun.
        options: Further arguments of the command.
    """

    def __init__(self, folder: Path, processes: int = 1, options: tuple[str, ...] = ()) -> None:
        self.folder, self.processes, self.options = folder, processes, options
        self.environment = {**os.environ, "MASKCF_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        rng = np.random.default_rng(0)
        for name in ("cat", "dog", "owl"):
            (folder / "images" / name).mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
        self.runs = 0
        self.whole = folder / "whole"
        begun = time.monotonic()
        process = self.start(self.whole)
        self.wait_for(self.whole, 1, process)
        self.startup = time.monotonic() - begun
        self.check(process, 0)
        self.expected = self.outcome(self.whole)

    def command(self, out: Path, *arguments: str) -> list[str]:
        """The whole command line but for how Python is started."""
        images = str(self.folder / "images")
        settings = {
            "data.train": images, "data.id": images, "data.backend": "torch", "data.threads": "1",
            "model.weights": "random", "model.arch": "tiny", "optim.batch-size": "6", "optim.lr": "1e-3",
            "optim.epochs": str(STEPS // EPOCH), "checkpoint-every": "3", "log-every": "1", "device": "cpu",
            "out": str(out), "resume": "auto",
        }  # fmt: skip
        flat = [part for name, value in settings.items() for part in (f"--{name}", value)]
        return [*flat, *self.options, *arguments]

    def start(self, out: Path, *arguments: str, script: list[str] = TRAIN, restarts: int = 0) -> subprocess.Popen:
        """Start a run; ``script`` in place of the command's module."""
        launch = [sys.executable]
        if self.processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
            launch += ["--max-restarts", str(restarts)]
        return subprocess.Popen(
            [*launch, *script, *self.command(out, *arguments)],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def check(self, process: subprocess.Popen, *codes: int) -> str:
        """Wait for a process; its messages. torchrun exits with 1 whatever the code of its processes was."""
        try:
            said, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            kill(process)
            raise Broken("hangs") from None
        if self.processes > 1:
            codes = tuple({min(code, 1) if code >= 0 else 1 for code in codes})
        if process.returncode not in codes:
            raise Broken(f"exit code {process.returncode}, not {codes}: {said[-600:]}")
        if OWN_TRACEBACK.search(said):
            raise Broken(f"a traceback: {said[-600:]}")
        return said

    def fresh(self, copied: Path | None = None) -> Path:
        """A folder for another run, or a copy of one."""
        self.runs += 1
        out = self.folder / f"run{self.runs}"
        if copied is not None:
            shutil.copytree(copied, out)
        return out

    def half(self) -> Path:
        """A run that was asked to end half-way, made once."""
        out = self.folder / "half"
        if not out.exists():
            process = self.start(out)
            self.wait_for(out, STEPS // 2, process)
            os.kill(process.pid, signal.SIGTERM)
            self.check(process, 75)
        return out

    def workers(self, process: subprocess.Popen) -> list[int]:
        """The processes that train."""
        if self.processes == 1:
            return [process.pid]
        return [
            pid for pid in children(process.pid) if b"maskcf_fast.train" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def outcome(self, out: Path) -> tuple[bytes, list]:
        """A finished run's weights, and its log without the speeds."""
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for line in log:
            line.pop("images_per_second", None)
        return (out / "model.safetensors").read_bytes(), log

    def wait_for(self, out: Path, step: int, process: subprocess.Popen) -> None:
        """Until a run has logged a step."""
        end = time.monotonic() + 240
        while step_of(out) < step:
            if process.poll() is not None or time.monotonic() > end:
                kill(process)
                raise Broken(f"the run ended at step {step_of(out)}: {process.communicate()[0][-600:]}")
            time.sleep(0.005)

    def finish(self, out: Path) -> str:
        """Run the same command again; what it says. It must end as the undisturbed run did."""
        said = self.check(self.start(out), 0)
        weights, lines = self.outcome(out)
        if lines != self.expected[1]:
            raise Broken("another log")
        if weights != self.expected[0]:
            raise Broken("other weights")
        if left := [path for path in out.rglob(".*") if path.is_file()]:
            raise Broken(f"{left[0]} is left")
        return said


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # that thread has ended
            found += map(int, path.read_text().split())
    return found


def kill(process: subprocess.Popen) -> None:
    """kill -9 of a process and of all below it: torchrun gives each of its own a session of its own."""

    def end(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)  # starts none meanwhile
            for child in children(pid):
                end(child)
            os.kill(pid, signal.SIGKILL)

    end(process.pid)


def step_of(out: Path) -> int:
    """The last step that a run has logged, or -1."""
    try:
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def saved_step(out: Path) -> int:
    """The step of a run's newest checkpoint, or -1."""
    return max((int(path.parent.name[5:]) for path in out.glob("checkpoints/step-*/state.json")), default=-1)


def lost_steps(out: Path, at: int) -> str:
    """What a run that was at a step has to do again."""
    return f"{max(0, at - max(0, saved_step(out)))} steps"


def killed_at_random(bench: Bench, rng: random.Random, _: int) -> str:
    """kill -9 of everything three times a run, at any time from the start of Python to the end"""
    out, lost = bench.fresh(), 0
    for _ in range(3):
        process = bench.start(out)
        if rng.random() < 0.2:
            time.sleep(rng.random() * bench.startup)
        else:
            with suppress(Broken):  # it has already come to its end
                bench.wait_for(out, rng.randrange(min(max(0, step_of(out)), STEPS - 2), STEPS - 1), process)
            time.sleep(rng.random() * 0.3)
        at = step_of(out)
        kill(process)
        process.communicate()
        lost = max(lost, at - max(0, saved_step(out)))
    bench.finish(out)
    return f"{lost} steps"


POINTS = {
    "maskcf_fast.training.trainer.write_run_files": 1,  # the folder is there, and nothing in it
    "maskcf_fast.training.checkpoint.save_tensors": 3,  # before anything of a checkpoint is written
    "maskcf_fast.training.checkpoint.save_json": 3,  # its tensors are there, what says so is not
    "maskcf_fast.training.checkpoint.remove_old": 3,  # it is complete, older ones are still there
    "maskcf_fast.training.trainer.update_checkpoint": 2,  # an epoch is measured, and not noted
    "maskcf_fast.training.trainer.save_full": 2,  # before the best model, and the last
    "os.replace": 5,  # a file is written, and not yet in its place
    "os.fsync": 5,
}
TIMES = [(point, n) for point, most in POINTS.items() for n in range(1, most + 1)]


def killed_at_a_point(bench: Bench, rng: random.Random, trial: int) -> str:
    """kill -9 at a named point of a run's writes, the first also; of several processes, of the one that is there"""
    if bench.processes == 1:
        point, n = TIMES[trial % len(TIMES)]
    else:
        point = list(POINTS)[trial % len(POINTS)]
        n = rng.randint(1, POINTS[point])
    out = bench.fresh()
    process = bench.start(out, script=[str(HERE / "dying.py"), point, str(n)])
    bench.check(process, -signal.SIGKILL)
    lost = lost_steps(out, step_of(out))
    bench.finish(out)
    return lost


def asked_to_end(bench: Bench, rng: random.Random, trial: int) -> str:
    """SIGTERM, SIGUSR1 or SIGINT to one process, to all, or (not SIGUSR1) to torchrun; the step is saved"""
    out = bench.fresh()
    number = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT][trial % 3]
    process = bench.start(out)
    bench.wait_for(out, rng.randrange(1, STEPS - 6), process)
    workers = bench.workers(process)
    targets = [[rng.choice(workers)], workers, [process.pid]][rng.randrange(2 if number == signal.SIGUSR1 else 3)]
    for pid in targets:
        os.kill(pid, number)
    said = bench.check(process, 130 if number == signal.SIGINT else 75)
    if said.count(f"after step {saved_step(out)} of {STEPS}, which is saved") != 1:
        raise Broken(f"{number.name}: saved step {saved_step(out)}, said {said[-300:]}")
    bench.finish(out)
    return "0 steps"


def asked_and_killed(bench: Bench, rng: random.Random, _: int) -> str:
    """SIGTERM and then, before the step can be saved, kill -9, as a scheduler does after its grace period"""
    out = bench.fresh()
    process = bench.start(out)
    bench.wait_for(out, rng.randrange(1, STEPS - 4), process)
    at = step_of(out)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):
        os.kill(process.pid, number)
    time.sleep(rng.random() * 0.05)
    kill(process)
    process.communicate()
    lost = lost_steps(out, at)
    bench.finish(out)
    return lost


def bit_flipped(bench: Bench, rng: random.Random, _: int) -> str:
    """one bit of the newest checkpoint of a run: it is passed over"""
    out = bench.fresh(bench.half())
    step = saved_step(out)
    flip(rng.choice(list(out.glob(f"checkpoints/step-{step}/*"))), rng)
    lost = f"{step - sorted(int(path.name[5:]) for path in out.glob('checkpoints/*'))[0]} steps"
    if "damaged" not in bench.finish(out):
        raise Broken("no word of it")
    return lost


def model_flipped(bench: Bench, rng: random.Random, _: int) -> str:
    """one bit of a finished model: it is refused by its name"""
    out = bench.fresh(bench.whole)
    path = rng.choice(list(out.glob("*.safetensors")))
    flip(path, rng)
    said = bench.check(bench.start(bench.fresh(), "--model.weights", str(path)), 1)
    if "is damaged" not in said or path.name not in said:
        raise Broken(f"said {said[-300:]}")
    return "nothing"


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda data, rng: b"",
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "a block of zeros": lambda data, rng: data[: (at := rng.randrange(len(data)))] + bytes(512) + data[at + 512 :],
    "noise": lambda data, rng: rng.randbytes(len(data) % 4096),
    "doubled": lambda data, rng: data * 2,
    "deep": lambda data, rng: b"[" * 100_000,
    "a letter": lambda data, rng: data[: (at := rng.randrange(len(data)))] + b"x" + data[at + 1 :],
    "a bit": lambda data, rng: data[: (at := rng.randrange(len(data)))] + bytes([data[at] ^ 4]) + data[at + 1 :],
}


def mutated(bench: Bench, rng: random.Random, trial: int) -> str:
    """a file of a run, or of its cache, emptied, cut, doubled, noise …: it goes on, or is refused in one message"""
    out = bench.fresh(bench.half())
    cache = shutil.copytree(bench.folder / "cache", bench.folder / f"cache{bench.runs}")
    path = rng.choice([p for folder in (out, cache) for p in sorted(folder.rglob("*")) if p.is_file()])
    kind = list(MUTATIONS)[trial % len(MUTATIONS)]
    path.write_bytes(MUTATIONS[kind](path.read_bytes(), rng))
    before = bench.environment
    bench.environment = {**before, "MASKCF_CACHE": str(cache)}
    try:
        process = bench.start(out)
        said = bench.check(process, 0, 1, 2)
    except Broken as error:
        raise Broken(f"{path.name}, {kind}: {error}") from None
    finally:
        bench.environment = before
        shutil.rmtree(cache)
    if process.returncode:
        if str(out) not in said and str(cache) not in said:
            raise Broken(f"{path.name}, {kind}: said {said[-300:]}")
        return "refused by name"
    if bench.outcome(out)[0] != bench.expected[0]:
        raise Broken(f"{path.name}, {kind}: other weights")
    return "at most a line of the log"


def disk_full(bench: Bench, rng: random.Random, trial: int) -> str:
    """a full disk (a small tmpfs), or files that may not grow (RLIMIT_FSIZE), from some step on"""
    out = bench.fresh()
    with small_disk(out) if trial % 2 else nullcontext() as mounted:
        process = bench.start(out)
        bench.wait_for(out, rng.randrange(STEPS - 8), process)
        at = step_of(out)
        if mounted:
            with suppress(OSError), (out / "other").open("wb") as other:
                while other.write(bytes(100_000)):
                    pass
        else:
            size = rng.choice([0, 1, SMALL])
            for pid in bench.workers(process):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
        said = bench.check(process, 1)
        if said.count("cannot write") != 1 or str(out) not in said:
            raise Broken(f"said {said[-900:]}")
        lost = lost_steps(out, at)
        (out / "other").unlink(missing_ok=True)
        bench.finish(out)
        return lost


@contextmanager
def small_disk(out: Path) -> Iterator[bool]:
    """A file system of its own for a folder, if this user may mount one."""
    out.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m", "tmpfs", str(out)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=True)


def two_at_once(bench: Bench, rng: random.Random, _: int) -> str:
    """a second process with the same command: refused, by the first one's number; the first goes on"""
    out = bench.fresh()
    first = bench.start(out)
    bench.wait_for(out, rng.randrange(STEPS - 10), first)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        said = bench.check(bench.start(out), 1)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    if f"in use by process {first.pid} on" not in said:
        raise Broken(f"said {said[-300:]}")
    bench.check(first, 0)
    bench.finish(out)
    return "nothing"


def rank_killed(bench: Bench, rng: random.Random, _: int) -> str:
    """kill -9 of one process under torchrun --max-restarts 1: named at most once, and all are restarted"""
    out = bench.fresh()
    process = bench.start(out, restarts=1)
    bench.wait_for(out, rng.randrange(2, STEPS - 8), process)
    at = step_of(out)
    os.kill(rng.choice(bench.workers(process)), signal.SIGKILL)
    said = bench.check(process, 0)
    if said.count("ended without a word, killed or out of memory") > 1:  # torchrun may see it before the others do
        raise Broken(f"said {said[-900:]}")
    bench.finish(out)
    return f"up to {at - at // 3 * 3 + 1} steps"


Fault = Callable[[Bench, random.Random, int], str]
FAULTS: dict[Fault, tuple[int, int, int]] = {  # how often: with one process, with two, and with two and FSDP
    killed_at_random: (10, 10, 10),
    killed_at_a_point: (len(TIMES), len(POINTS), len(POINTS)),
    asked_to_end: (12, 6, 6),
    asked_and_killed: (3, 0, 0),
    rank_killed: (0, 4, 4),
    disk_full: (6, 2, 2),
    bit_flipped: (10, 4, 2),
    model_flipped: (5, 2, 2),
    mutated: (24, 0, 0),
    two_at_once: (2, 0, 0),
}
KINDS = {"1": (1, ()), "2": (2, ()), "2, FSDP": (2, ("--parallel", "fsdp"))}
MEASURED = HERE / "measured.json"  # what a page's table is made of: the newest result of each fault and kind


def measure(fault: Fault, bench: Bench, kind: str, count: int, rng: random.Random) -> dict[str, Any]:
    """Do a fault; what came of it, as `MEASURED` keeps it."""
    from maskcf_fast.training.log import cpu_name

    outcomes: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    begun = time.monotonic()
    for trial in range(count):
        try:
            lost[fault(bench, rng, trial)] += 1
            outcomes[SAME] += 1
        except (Broken, OSError, ValueError) as error:
            outcomes[f"FAILED: {' '.join(str(error).split())[:200]}"] += 1
            print(f"{fault.__name__} {kind} trial {trial}: {error}", file=sys.stderr, flush=True)
        for path in bench.folder.glob("run*"):
            shutil.rmtree(path)
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    commit = revision.stdout.strip()  # nothing without a repository
    machine = f"{os.cpu_count()} cores ({cpu_name()}), {platform.system()}"
    return {
        "fault": fault.__name__, "processes": kind, "times": count, "outcomes": dict(outcomes), "lost": dict(lost),
        "minutes": round((time.monotonic() - begun) / 60, 1), "date": f"{date.today()}", "commit": commit,
        "with": f"{machine}, Python {platform.python_version()}, torch {version('torch')}",
    }  # fmt: skip


def row(result: dict[str, Any]) -> str:
    """A result's row of the table."""
    lost = result["lost"]
    steps = [int(number) for text in lost for number in re.findall(r"(\d+) steps", text)]
    span = f"{min(steps)} to {max(steps)}" if len(set(steps)) > 1 else str(*set(steps))
    cost = f"{span} steps" if steps else "; ".join(f"{text} ({n})" for text, n in lost.items())
    shown = "; ".join(f"{text} ({n})" for text, n in result["outcomes"].items())
    about = globals()[result["fault"]].__doc__
    state = f"{result['date']}, {result['commit']}"
    return f"| {about} | {result['processes']} | {result['times']} | {shown} | {cost} | {result['minutes']} | {state} |"


def main() -> int:
    """Do faults, print their rows, and keep them for the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of how often each fault is done")
    parser.add_argument("--only", default="", help="names that hold this")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--page",
        type=Path,
        help=f"keep what is done in {MEASURED.name}, and write all of that between the page's marks",
    )
    options = parser.parse_args()
    one = Lock()

    def all_of(kind: str) -> int:
        failed = 0
        chosen = {fault: n[list(KINDS).index(kind)] for fault, n in FAULTS.items() if options.only in fault.__name__}
        if not any(chosen.values()):
            return 0
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), *KINDS[kind])
            for fault in [fault for fault, n in chosen.items() if n]:
                count = max(1, round(chosen[fault] * options.share))
                result = measure(fault, bench, kind, count, random.Random(f"{options.seed} {fault.__name__}"))
                failed += count - result["outcomes"].get(SAME, 0)
                with one:
                    print(row(result), flush=True)
                    if options.page is not None:
                        keep(result)
                        write_page(options.page)
        return failed

    with ThreadPoolExecutor() as pool:  # one kind at a time would leave cores idle
        harm = sum(pool.map(all_of, options.kinds))
    if options.page is not None:
        write_page(options.page)
    return 1 if harm else 0


def keep(result: dict[str, Any]) -> None:
    """Put a result in the place of an older one."""
    key = itemgetter("fault", "processes")
    results = {key(old): old for old in json.loads(MEASURED.read_text())} | {key(result): result}
    order = [fault.__name__ for fault in FAULTS]
    kept = sorted(results.values(), key=lambda r: (order.index(r["fault"]), list(KINDS).index(r["processes"])))
    MEASURED.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def write_page(page: Path) -> None:
    """Put the table of all results in the place of the one in a page."""
    kept = json.loads(MEASURED.read_text())
    start, end = "<!-- faults -->\n", "<!-- end of faults -->\n"
    before, rest = page.read_text().split(start)
    head = "| fault | processes | times | outcome | lost | minutes | measured of |\n|---|---|--:|---|---|--:|---|"
    done = {(r["fault"], r["processes"]) for r in kept}
    left = [
        f"{fault.__name__} ({kind})"
        for fault, counts in FAULTS.items()
        for kind, count in zip(KINDS, counts, strict=True)
        if count and (fault.__name__, kind) not in done
    ]
    missing = f"\nNot measured yet: {', '.join(left)}.\n" if left else ""
    made = f"Beside other work on {'; and on '.join(sorted({r['with'] for r in kept}))}:"
    page.write_text(
        "\n".join([f"{before}{start}{made}\n", head, *map(row, kept), f"{missing}{end}{rest.split(end)[1]}"])
    )


if __name__ == "__main__":
    sys.exit(main())
