"""Breaks real training runs, and sees what is lost. ``python tests/faults/breaking.py`` prints the table of all faults.

Every fault is done to the train command in a process of its own. A run survives it if the same command, with
``--resume auto``, afterwards ends with the very weights and log of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
TRAIN = [sys.executable, "-m", "maskcf_fast.train"]
STEPS, EPOCH = 40, 10
SMALL = 300_000  # bytes: less than a checkpoint of the tiny model, more than all else


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
        self.check(self.start(self.whole), 0)
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

    def start(self, out: Path, *arguments: str, launch: list[str] | None = None, **popen) -> subprocess.Popen:
        """Start a run; ``launch`` in place of Python and the module."""
        if launch is None and self.processes > 1:
            launch = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(self.processes),
            ]
            launch += ["-m", "maskcf_fast.train"]
        return subprocess.Popen(
            [*(launch or TRAIN), *self.command(out, *arguments)],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **popen,
        )  # fmt: skip

    def check(self, process: subprocess.Popen, *codes: int) -> str:
        """Wait for a process; its messages."""
        try:
            _, errors = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Broken("hangs") from None
        if process.returncode not in codes:
            raise Broken(f"exit code {process.returncode}, not {codes}: {errors[-600:]}")
        if "Traceback" in errors and self.processes == 1 and "tensorboard" not in errors:  # its thread prints its own
            raise Broken(f"a traceback: {errors[-600:]}")
        return errors

    def fresh(self) -> Path:
        """A folder for another run."""
        self.runs += 1
        return self.folder / f"run{self.runs}"

    def outcome(self, out: Path) -> tuple[bytes, list]:
        """A finished run's weights, and its log without the speeds."""
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for line in log:
            line.pop("images_per_second", None)
        return (out / "model.safetensors").read_bytes(), log

    def wait_for(self, out: Path, step: int, process: subprocess.Popen) -> None:
        """Until a run has logged a step."""
        end = time.monotonic() + 120
        while step_of(out) < step:
            if process.poll() is not None or time.monotonic() > end:
                raise Broken(f"the run ended at step {step_of(out)}: {process.communicate()[1][-600:]}")
            time.sleep(0.005)

    def finish(self, out: Path, *codes: int) -> str:
        """Run the same command again; what it says. It must end as the undisturbed run did."""
        said = self.check(self.start(out), *(codes or (0,)))
        weights, log = self.outcome(out)
        if log != self.expected[1]:
            raise Broken("another log")
        if weights != self.expected[0]:
            raise Broken("other weights")
        if left := [path for path in out.rglob(".*") if path.is_file()]:
            raise Broken(f"{left[0]} is left")
        return said


def step_of(out: Path) -> int:
    """The last step that a run has logged, or -1."""
    try:
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def saved_step(out: Path) -> int:
    """The step of a run's newest checkpoint, or -1."""
    return max((int(path.parent.name[5:]) for path in out.glob("checkpoints/step-*/state.json")), default=-1)


def killed_at_random(bench: Bench, rng: random.Random) -> str:
    """kill -9 at any time from the start of Python to the end."""
    out = bench.fresh()
    process = bench.start(out, start_new_session=True)
    if rng.random() < 0.8:
        bench.wait_for(out, rng.randrange(STEPS - 3), process)
    time.sleep(rng.random() * 0.3)
    at = step_of(out)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    lost = at - max(0, saved_step(out)) if at > 0 else 0
    bench.finish(out)
    return f"{lost} steps to do again"


POINTS = {
    "maskcf_fast.training.checkpoint.save_tensors": 3,  # before anything of a checkpoint is written
    "maskcf_fast.training.checkpoint.save_json": 3,  # its tensors are there, what says so is not
    "maskcf_fast.training.checkpoint.remove_old": 3,  # it is complete, older ones are still there
    "maskcf_fast.training.trainer.update_checkpoint": 2,  # an epoch is measured, and not noted
    "maskcf_fast.training.trainer.save_full": 1,  # before the best and the last model
    "maskcf_fast.training.trainer.write_run_files": 1,  # the folder is there, and nothing in it
    "os.replace": 4,  # a file is written, and not yet in its place
    "os.fsync": 6,
}


def killed_at_a_point(bench: Bench, rng: random.Random) -> str:
    """kill -9 at a named point, also in the first write."""
    point = rng.choice(list(POINTS))
    out = bench.fresh()
    launch = [sys.executable, str(HERE / "dying.py"), point, str(rng.randint(1, POINTS[point]))]
    bench.check(bench.start(out, launch=launch), -signal.SIGKILL)
    bench.finish(out)
    return "nothing"


def asked_to_end(bench: Bench, rng: random.Random) -> str:
    """SIGTERM, SIGUSR1 or SIGINT, to the process or to all of its group; the step is saved."""
    out = bench.fresh()
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    process = bench.start(out, start_new_session=True)
    bench.wait_for(out, rng.randrange(1, STEPS - 4), process)
    (os.killpg if rng.random() < 0.5 and bench.processes == 1 else os.kill)(process.pid, number)
    said = bench.check(process, 130 if number == signal.SIGINT else 75)
    if f"stopped by {number.name} after step {saved_step(out)} of {STEPS}" not in said:
        raise Broken(f"saved step {saved_step(out)}, said {said[-300:]}")
    bench.finish(out)
    return "nothing"


def asked_and_killed(bench: Bench, rng: random.Random) -> str:
    """SIGTERM and then, before the step can be saved, kill -9, as a scheduler does after its grace period."""
    out = bench.fresh()
    process = bench.start(out)
    bench.wait_for(out, rng.randrange(1, STEPS - 4), process)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):
        os.kill(process.pid, number)
    time.sleep(rng.random() * 0.05)
    process.kill()
    process.communicate()
    bench.finish(out)
    return "at most since the last checkpoint"


def bit_flipped(bench: Bench, rng: random.Random) -> str:
    """One bit of one file of a finished run: the newest checkpoint is passed over, a model is refused by its name."""
    out = bench.fresh()
    shutil.copytree(bench.whole, out)
    files = [*out.glob(f"checkpoints/step-{saved_step(out)}/*"), *out.glob("*.safetensors")]
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    if path.parent.parent.name == "checkpoints":
        bench.finish(out)
        return "the steps since the checkpoint before"
    said = bench.check(bench.start(bench.fresh(), "--model.weights", str(path)), 1)
    if "is damaged" not in said or path.name not in said:
        raise Broken(f"said {said[-300:]}")
    return "nothing: it is refused by name"


def disk_full(bench: Bench, rng: random.Random) -> str:
    """Files cannot grow beyond a size (RLIMIT_FSIZE), from some step on."""
    out = bench.fresh()
    process = bench.start(out)
    bench.wait_for(out, rng.randrange(STEPS - 8), process)
    size = rng.choice([0, 1, SMALL])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    said = bench.check(process, 1)
    if "cannot write" not in said or str(out) not in said:
        raise Broken(f"said {said[-300:]}")
    bench.finish(out)
    return "the steps since the last checkpoint"


def two_at_once(bench: Bench, rng: random.Random) -> str:
    """A second process with the same command: refused, by the first one's number; the first goes on."""
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


def odd_log(bench: Bench, rng: random.Random) -> str:
    """Bytes that are no text in metrics.jsonl: the line is dropped, and named."""
    out = bench.fresh()
    process = bench.start(out)
    bench.wait_for(out, rng.randrange(5, STEPS - 10), process)
    process.kill()
    process.communicate()
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines.insert(rng.randrange(2), b"\xff\x00{\n")
    (out / "metrics.jsonl").write_bytes(b"".join(lines))
    bench.finish(out)
    return "the line"


def rank_killed(bench: Bench, rng: random.Random) -> str:
    """kill -9 of one process of two under torchrun --max-restarts 1: named, and restarted."""
    out = bench.fresh()
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    process = bench.start(out, launch=[*launch, "-m", "maskcf_fast.train"])
    bench.wait_for(out, rng.randrange(2, STEPS - 8), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = rng.choice([pid for pid in children if "maskcf_fast.train" in Path(f"/proc/{pid}/cmdline").read_text()])
    os.kill(int(victim), signal.SIGKILL)
    said = bench.check(process, 0)
    if said.count("ended without a word, killed or out of memory") > 1:  # torchrun may see it before the others do
        raise Broken(f"said {said[-900:]}")
    bench.finish(out)
    return "the steps since the last checkpoint"


FAULTS: dict[Callable[[Bench, random.Random], str], int] = {
    killed_at_random: 30, killed_at_a_point: 30, asked_to_end: 20, asked_and_killed: 5, bit_flipped: 20, disk_full: 8,
    two_at_once: 3, odd_log: 3,
}  # fmt: skip
DISTRIBUTED: dict[Callable[[Bench, random.Random], str], int] = {killed_at_random: 3, rank_killed: 3}


def main() -> int:
    """Do every fault as often as it says, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of how often each fault is done")
    parser.add_argument("--only", default="", help="names that hold this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print("| fault | processes | times | outcome | lost |\n|---|---|---|---|---|")
    failed = 0
    for processes, extra, faults in ((1, (), FAULTS), (2, (), DISTRIBUTED), (2, ("--parallel", "fsdp"), DISTRIBUTED)):
        chosen = {fault: n for fault, n in faults.items() if options.only in fault.__name__}
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), processes, extra)
            for fault, times in chosen.items():
                count = max(1, round(times * options.share))
                outcomes: Counter[str] = Counter()
                lost = set()
                for _ in range(count):
                    try:
                        lost.add(fault(bench, rng))
                        outcomes["the same run in the end"] += 1
                    except Broken as error:
                        failed += 1
                        outcomes[f"FAILED: {error}"] += 1
                    for path in Path(folder).glob("run*"):
                        shutil.rmtree(path)
                steps = [int(text.split()[0]) for text in lost if text[0].isdigit()]
                cost = f"{min(steps)} to {max(steps)} steps to do again" if steps else ", ".join(sorted(lost))
                shown = "; ".join(f"{text} ({n})" if len(outcomes) > 1 else text for text, n in outcomes.items())
                what = " ".join((fault.__doc__ or "").split()).rstrip(".")
                kind = f"{processes}{' (fsdp)' if extra else ''}"
                print(f"| {what} | {kind} | {count} | {' '.join(shown.split())} | {cost} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
