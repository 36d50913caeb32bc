"""Runs that end half-way, and what is found in a run's folder, to look at and to spoil."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from maskcf_fast.training import Trainer
from maskcf_fast.training.checkpoint import ALONE, load_checkpoint, save_checkpoint


class Died(BaseException):
    pass


def after_dying(config, folder: Path, step: int) -> Trainer:
    """A run that died in the middle of a step, as if the machine had; the trainer that continues it."""
    broken = Trainer(replace(config, out=folder, resume=None), quiet=True)
    real = broken._optimizer_step

    def dying(micro):
        if broken.step == step:
            raise Died
        real(micro)

    broken._optimizer_step = dying
    with pytest.raises(Died):
        broken.run()
    return Trainer(replace(config, out=None, resume=folder), quiet=True)


def metrics(run: Path, name: str) -> list[dict]:
    """The lines of the log that have a figure of that name."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if name in line]


def values(run: Path) -> dict:
    """The plain values of the newest checkpoint."""
    return load_checkpoint(run).values


def tensors(run: Path, prefix: str = "") -> dict:
    """Its tensors whose names begin so, without the prefix."""
    checkpoint = load_checkpoint(run)
    return {name.removeprefix(prefix): checkpoint.read(name) for name in checkpoint.index if name.startswith(prefix)}


def rewrite(run: Path, change_values=lambda v: v, change_tensors=lambda t: t) -> None:
    """Write the newest checkpoint again with other contents, whose digests are right."""
    held = values(run), tensors(run)
    save_checkpoint(run, held[0]["step"], change_values(held[0]), change_tensors(held[1]), ALONE, keep=9)


def caller(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], result: Path, *fixed: object):
    """``called(*arguments)``: a command's exit code with these and the fixed ones, what it printed, what it left."""

    def called(*arguments: object) -> tuple[int, str, dict | None]:
        code = main([*map(str, fixed), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err, json.loads(result.read_text()) if result.exists() else None

    return called
