"""Checkpoints: folders of a run's state, each complete or none, read without executing code.

``checkpoints/step-N/state.json`` holds what is plain, and which file has which rows of each tensor; it is written last.
A tensor that is divided among the processes is written by all of them, each its rows; every process then reads the rows
that it needs, under whatever number of processes. All files carry a digest.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.processes import Processes
from ..core.schema import Range, conform
from ..core.tensors import DTYPES, NAMES, DamagedFile, check_digest, load_json, save_json, save_tensors
from .sharding import local_rows

STATE = "state.json"
VERSION = 1
ALONE = Processes(0, 1, torch.device("cpu"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    found = [path.parent for path in (run / "checkpoints").glob(f"step-*/{STATE}")]
    return sorted((path for path in found if path.name[5:].isdecimal()), key=lambda path: -int(path.name[5:]))


def save_checkpoint(
    run: Path, step: int, values: dict[str, Any], tensors: Mapping[str, Tensor], processes: Processes, keep: int
) -> None:
    """Write a checkpoint and remove all but the newest ``keep``. All processes call this alike.

    Args:
        run: The run's folder, which all processes see.
        step: What it is called by; one of the same step is replaced.
        values: Plain values, and bytes.
        tensors: By name, whole or divided.
        processes: The processes of the run.
        keep: How many to keep.

    Raises:
        OSError: It could not be written (disk full, no permission); those before it stay.
    """
    folder = run / "checkpoints" / f"step-{step}"

    def begin() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return secrets.token_hex(4)  # of the files' names: those of a checkpoint to be replaced stay until then

    token = processes.on_main(begin)
    file = folder / f"{processes.rank:05d}-{token}.safetensors"
    rows = {name: local_rows(tensor) for name, tensor in tensors.items()}
    # What is whole in all processes, the main one writes.
    mine = {name: local for name, (local, start) in rows.items() if (processes.main if start is None else len(local))}

    def write() -> tuple[str, dict[str, tuple[int, int]]]:
        save_tensors(file, mine)
        return file.name, {name: (start := rows[name][1] or 0, start + _length(mine[name])) for name in mine}

    try:
        parts = processes.together(write if mine else lambda: (file.name, {}))
        processes.on_main(lambda: _commit(folder, values, tensors, parts))
    except (UserError, OSError):
        with suppress(OSError):
            file.unlink(missing_ok=True)
        raise
    if processes.main:
        kept = {part for part, names in parts if names} | {STATE}
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()
        remove_old(run, keep)


def _commit(
    folder: Path, values: dict[str, Any], tensors: Mapping[str, Tensor], parts: list[tuple[str, dict[str, Any]]]
) -> None:
    if lacking := [part for part, names in parts if names and not (folder / part).is_file()]:
        raise UserError(f"{folder} is not the same folder for all machines, it lacks {lacking[0]}: use a shared --out")
    index: dict[str, Any] = {
        name: {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "rows": []}
        for name, tensor in tensors.items()
    }
    for part, names in parts:
        for name, (start, stop) in names.items():
            index[name]["rows"].append([part, start, stop])
    save_json(folder / STATE, {"version": VERSION, **values, "tensors": index})


def update_checkpoint(run: Path, step: int, values: dict[str, Any], processes: Processes) -> None:
    """Replace the plain values of a checkpoint, whose tensors are still the run's."""
    path = run / "checkpoints" / f"step-{step}" / STATE
    processes.on_main(lambda: save_json(path, {**load_json(path), **values}))


def remove_old(run: Path, keep: int) -> None:
    """Remove what is older than the newest ``keep`` checkpoints, and what was never finished."""
    kept = checkpoints(run)[:keep]
    for folder in (run / "checkpoints").glob("step-*"):
        if folder not in kept:
            with suppress(FileNotFoundError):
                (folder / STATE).unlink()  # first, so that no reader takes the rest for complete
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        dtype: As safetensors names it.
        shape: Of the whole tensor.
        rows: ``(file, start, stop)`` of each piece; what has no dimensions counts as one row.

    Raises:
        UserError: There is no such dtype, the pieces are not all rows or overlap, or a file lies elsewhere.
    """

    dtype: str
    shape: list[Annotated[int, Range(0, 2**40)]]
    rows: list[tuple[str, int, int]]

    def __post_init__(self) -> None:
        self.rows.sort(key=lambda row: row[1:])
        edges = [0, *(edge for row in self.rows for edge in row[1:]), self.length]
        if self.dtype not in DTYPES:
            raise UserError(f"there is no dtype {self.dtype!r}")
        if edges[::2] != edges[1::2] or edges != sorted(edges):
            raise UserError(f"its {len(self.rows)} pieces are not the rows of {self.shape}")
        if outside := [part for part, _, _ in self.rows if Path(part).name != part]:
            raise UserError(f"{outside[0]!r} is not the name of a file")

    @property
    def length(self) -> int:
        """How many rows there are."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: Where it lies.
        values: The plain values.
        index: Where each tensor lies.
    """

    folder: Path
    values: dict[str, Any]
    index: dict[str, Stored]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or some of its rows, on the CPU.

        Raises:
            UserError: There is none of this name, or not all of it.
        """
        from safetensors import SafetensorError, safe_open

        if name not in self.index:
            raise self.error(f"lacks {name}")
        said = self.index[name]
        stop = said.length if stop is None else stop
        if not 0 <= start <= stop <= said.length:
            raise self.error(f"has no rows {start} to {stop} of {name}, which is {said.shape}")
        pieces = []
        for part, first, last in said.rows:
            low, high = max(start, first), min(stop, last)
            if low < high or (start == stop == first == last):
                try:
                    with safe_open(self.folder / part, "pt") as file:
                        piece = file.get_slice(name)
                        shape = [last - first, *said.shape[1:]] if said.shape else []
                        if (piece.get_dtype(), piece.get_shape()) != (said.dtype, shape):
                            raise self.error(f"holds other rows of {name} in {part} than it says")
                        pieces.append(piece[low - first : high - first] if shape else piece[...])
                except (SafetensorError, OSError, RuntimeError) as error:
                    raise self.error(f"does not hold all of {name} ({error})") from error
        if not pieces:
            return torch.empty([0, *said.shape[1:]], dtype=DTYPES[said.dtype])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def fill(self, name: str, target: Tensor) -> None:
        """Read a tensor into ``target``, which may be divided among the processes: then only the rows of this one.

        Raises:
            UserError: It is of another shape or dtype, or not finite.
        """
        said = self.index.get(name)
        found = "nothing" if said is None else f"{said.dtype} {said.shape}"
        wanted = f"{NAMES[target.dtype]} {list(target.shape)}"
        if found != wanted:
            raise self.error(f"is of another model: {name} is {found}, not {wanted}")
        local, start = local_rows(target)
        value = self.read(name, start or 0, (start or 0) + _length(local))
        if value.is_floating_point() and not value.isfinite().all():
            raise self.error(f"holds NaN or infinity in {name}")
        with torch.no_grad():
            local.copy_(value)

    def value(self, name: str, hint: Any) -> Any:
        """A plain value, if it is of this type; see `conform`."""
        try:
            return conform(self.values.get(name), hint, name)
        except UserError as error:
            raise self.error(f"is damaged, {error}") from error

    def error(self, what: str) -> UserError:
        """An error that names the checkpoint, and what to do."""
        return UserError(f"{self.folder} {what}: remove it to continue from the one before, or begin in another --out")


def read_checkpoint(folder: Path, part: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Open a checkpoint.

    Args:
        folder: Where it lies.
        part: ``(i, n)``: check the digest of every n-th file, from the i-th.

    Raises:
        UserError: It is damaged, or of another version.
    """
    try:
        values: dict[str, Any] = load_json(folder / STATE)
        if values.pop("version", None) != VERSION:
            raise UserError(f"{folder} was written by another version of this package")
        index: dict[str, Stored] = conform(values.pop("tensors"), dict[str, Stored], f"{folder / STATE}: tensors")
        files = sorted({part for tensor in index.values() for part, _, _ in tensor.rows})
        for name in files[part[0] :: part[1]]:
            check_digest(folder / name, own=True)
        return Checkpoint(folder, values, index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(str(error) if isinstance(error, UserError | OSError) else f"{folder}: {error!r}") from error


def load_checkpoint(
    run: Path, processes: Processes = ALONE, say: Callable[[str], None] = lambda text: None
) -> Checkpoint:
    """The newest checkpoint of a run that is whole.

    Args:
        run: The run's folder.
        processes: Those of the run, which share the work of checking it.
        say: Is told of those that are not.

    Raises:
        FileNotFoundError: There is none.
        UserError: All are damaged.
    """
    found = processes.on_main(lambda: checkpoints(run))
    if not found:
        raise FileNotFoundError(f"no checkpoint in {run}: the run stopped before it wrote one; start it again")
    problems: list[str] = []
    for folder in found:
        opened: Checkpoint | None = None
        problem: str | None = None
        try:
            opened = read_checkpoint(folder, (processes.rank, processes.world_size))
        except UserError as error:
            problem = str(error)
        worst = next((text for text in processes.gather(problem) if text is not None), None)
        if worst is None:
            assert opened is not None
            if problems:
                say(f"{problems[-1]}; continuing from the checkpoint before it, {folder}")
            return opened
        problems.append(worst)
    raise UserError(f"no checkpoint in {run} is whole: {'; '.join(problems)}. Start the run again with another --out")


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.ndim else 1
