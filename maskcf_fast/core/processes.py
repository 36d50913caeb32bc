"""The processes of a run: one, or several started by torchrun."""

from __future__ import annotations

import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ReportedError, Stopped, UserError

T = TypeVar("T")

# A process may look through millions of images before the others have anything to do. One that dies is noticed at once.
PATIENCE = timedelta(days=7)
GRACE = 5.0  # seconds that the living have to say so, once a process is found to be missing


@dataclass(eq=False)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: Number of this process.
        world_size: How many there are.
        device: This process's.
        hosts: Name of each process's machine, by rank.
    """

    rank: int
    world_size: int
    device: torch.device
    hosts: tuple[str, ...] = ()
    _control: Any = field(default=None, repr=False)  # a gloo group for what concerns the host only
    _store: Any = field(default=None, repr=False)

    @classmethod
    def start(cls, device: str) -> Processes:
        """Join the group that torchrun's environment describes (gloo on a CPU, NCCL on a GPU), or run alone.

        Raises:
            ValueError: ``device`` is unknown, or there is no such device.
        """
        chosen = choose_device(device)
        if chosen.type == "cuda":
            if chosen.index is None:
                chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(chosen)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(0, 1, chosen, (socket.gethostname(),))
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = _own_part(store, rank, world_size)
        # Its functions take the group there is at its import as their default, and so would keep this one, with its
        # threads, until Python ends. PyTorch imports it at odd places, such as the first optimiser.
        import_module("torch.distributed.nn.functional")
        if not dist.is_initialized():
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.PrefixStore("run", store), rank=rank, world_size=world_size)
        control: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        hosts: list[Any] = [None] * world_size
        dist.all_gather_object(hosts, socket.gethostname(), group=control)
        return cls(rank, world_size, chosen, tuple(hosts), control, store)

    @property
    def main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """What a message calls this process."""
        return self._name(self.rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor``, on the device, summed over all processes in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait for all processes, as long as it takes."""
        if self.world_size > 1:
            dist.barrier(group=self._control)

    def together(self, function: Callable[[], T]) -> list[T]:
        """Every process's ``function()``, by rank; what a user can mend in one of them is raised in all."""
        result: Any = None
        error: Exception | None = None
        try:
            result = function()
        except (UserError, OSError, ImportError) as caught:
            error = caught
        if self.world_size == 1:
            if error is not None:
                raise error
            return [result]
        outcomes = self.gather((result, None if error is None else str(error)))
        failed = [rank for rank, (_, text) in enumerate(outcomes) if text is not None]
        if failed and failed[0] == self.rank:
            assert error is not None
            raise error
        if failed:
            raise ReportedError(f"{self._name(failed[0])}: {outcomes[failed[0]][1]}")
        return [value for value, _ in outcomes]

    def on_main(self, function: Callable[[], T]) -> T:
        """``function()`` of the main process, which alone calls it; what a user can mend there is raised in all."""
        results: list[Any] = self.together(function if self.main else lambda: None)
        return results[0]

    def vote(self) -> Callable[[int], int]:
        """Make a function of which all processes call their share in turn, and get the same answer.

        Its answer is the largest of all processes' values: of this call where there is one process, else of the call
        before it, or 0, so that nobody waits.
        """
        pending: list[tuple[Tensor, Any]] = []

        def ask(value: int) -> int:
            if self.world_size == 1:
                return value
            answer = 0
            if pending:
                tensor, work = pending.pop()
                work.wait()
                answer = int(tensor)
            tensor = torch.tensor(value)
            pending.append((tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True)))
            return answer

        return ask

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Leave the group at the end of the block; of several processes that fail in it, one says why.

        That is the first that failed by itself, by its rank and host. Where it could not say so (it was killed), one of
        the others names it: they all fail, for it is missing.

        Raises:
            ReportedError: Another process has said it.
            UserError: A process is missing.
        """
        try:
            yield
        except (Stopped, ReportedError):
            raise
        except Exception as error:
            if self.world_size == 1:
                raise
            missing = _says_that_one_is_missing(error)
            text = self._missing() if missing else None
            if not self._first_to_report():
                raise ReportedError(str(error)) from None
            if text is not None:
                raise UserError(text) from None
            if isinstance(error, UserError):
                raise type(error)(f"{self.name}: {error}") from error
            error.add_note(f"in {self.name}")
            raise
        finally:
            self.stop()

    def stop(self) -> None:
        """Leave the groups; the threads of gloo end with them, which could abort the process at Python's end."""
        self._control = None
        if self.world_size > 1 and dist.is_initialized():
            group = weakref.ref(dist.group.WORLD)
            dist.destroy_process_group()
            # FSDP's, which is kept with its mesh by DTensor's caches, that nothing public clears, and by a default
            # argument in torch.distributed.fsdp: time for its threads to let go of everything.
            if group() is not None:
                time.sleep(0.5)

    def _name(self, rank: int) -> str:
        return f"process {rank} of {self.world_size} (host {self.hosts[rank] if self.hosts else '?'})"

    def _first_to_report(self) -> bool:
        try:
            return self._store.add("reported", 1) == 1
        except Exception:  # the store was that of a process which is gone
            return True

    def _missing(self) -> str | None:
        """Which processes do not answer, in words; None if they all do, or one has said why it ended."""
        try:
            if self._store.check(["reported"]):
                return None
            self._store.set(f"alive/{self.rank}", "")
            end = time.monotonic() + GRACE
            gone = list(range(self.world_size))
            while gone and time.monotonic() < end:
                gone = [rank for rank in gone if not self._store.check([f"alive/{rank}"])]
                time.sleep(0.05)
        except Exception:
            gone = [0]  # whose the store was
        if not gone:
            return None
        names = ", ".join(map(self._name, gone))
        return (
            f"{names} ended without a word, killed or out of memory, and the others with it: see that machine's log. "
            "--resume auto continues from the last checkpoint"
        )


def choose_device(name: str) -> torch.device:
    """The device that a setting names: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``, which is cuda where there is one.

    Raises:
        ValueError: It is none of these, or there is no such device.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(kind)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be cpu, cuda or auto, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name!r}, but torch sees {torch.cuda.device_count() or 'no'} GPU: use --device cpu")
    return device


def _own_part(store: Any, rank: int, world_size: int) -> Any:
    """The part of a store that belongs to these processes, and to none that were started before them.

    torchrun's store outlasts a restart, and so do the addresses in it of processes that are gone. The main process
    therefore names a part, and tells each other one that asks: the question and the answer are new each time.

    Raises:
        UserError: A process does not come.
    """
    name = secrets.token_hex(8)
    if rank:
        store.set(f"asks/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.set(f"{name}/joined/{rank}", "")
        return dist.PrefixStore(name, store)
    end = time.monotonic() + store.timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):  # perhaps not yet this start's
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"{name}/joined/{other}"])]
        if missing and time.monotonic() > end:
            raise UserError(f"process {missing[0]} of {world_size} does not come: see its machine's log")
    return dist.PrefixStore(name, store)


def _says_that_one_is_missing(error: Exception) -> bool:
    """Whether an error comes from an exchange that a process did not take part in."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text or "NCCL" in text
    )
