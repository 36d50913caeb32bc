"""The training loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..core.errors import UserError
from ..core.processes import Processes
from ..core.tensors import fingerprint, save_tensors
from ..data import Batch
from ..methods import CounterfactualDistiller
from ..visualization.board import board_images, rows_for_board
from .build import build_loaders, build_method, build_model, build_optimizer, describe, scan
from .checkpoint import load_checkpoint, save_checkpoint
from .distributed import average_gradients, broadcast_state
from .evaluate import evaluate
from .log import RunLog, write_run_files
from .mask_memory import NO_GRAPH, MaskMemory
from .settings import TrainConfig, changed_settings
from .sharding import load_model_state, load_optimizer_state, shard, whole
from .speed import BETA1_MOVES, Backward, Graphed, GraphedBackward, compile_pointwise, why_no_graph


class TrainingDiverged(UserError):
    """The loss or its gradient is no longer finite."""


STATE = {
    "step", "best", "accuracy", "initial", "student", "optimizer", "schedule", "sums", "loaders", "generators"
}  # fmt: skip
STARTED = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard"}  # before the first checkpoint


def refuse_occupied(folder: Path) -> None:
    """Raise unless a run may be written to ``folder``: new, empty, or left by a run that never came to a checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: choose another --out")
    if (folder / "last.pt").exists():
        raise UserError(f"{folder} already holds a run: --resume {folder}, or choose another --out")
    if folder.exists() and (others := sorted({path.name for path in folder.iterdir()} - STARTED)):
        raise UserError(f"--out {folder} holds other files ({', '.join(others[:3])}): choose an empty or new folder")


class Trainer:
    """One run: fine-tunes, evaluates, logs, and writes checkpoints that it can continue from exactly.

    The folder of the run holds ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``tensorboard/``,
    ``last.pt`` (to resume from), ``best.safetensors`` (the epoch that was best on the held-out images, else on
    the in-distribution test set) and, at the end, ``model.safetensors``.

    Args:
        config: The settings; ``data.train`` and ``model.weights`` are given.
        processes: The processes of the run; started from the environment when None.
        quiet: Print nothing.
        title: What the progress bar says before the epoch; shows the bar in spite of ``quiet``.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: Settings, data or weights that do not fit together,
            a folder that already holds a run, or a checkpoint that is not of this run.
    """

    def __init__(
        self, config: TrainConfig, processes: Processes | None = None, *, quiet: bool = False, title: str = ""
    ) -> None:
        config.validate()
        self.processes = processes or Processes.start(config.device)
        self.folder = config.resume or config.out or Path("runs") / config.method.name
        self.config = dataclasses.replace(config, out=self.folder, resume=None)
        self.quiet = quiet or not self.processes.main
        self.title = title
        if config.resume is None:
            refuse_occupied(self.folder)
        if config.resume is not None and (changed := changed_settings(self.config, self.folder / "config.yaml")):
            raise UserError(f"{self.folder} continues with its own settings only; changed: {', '.join(changed)}")

        train, tests = scan(config.data, self.processes)
        self._report_data(train, tests)
        model = build_model(config.model, len(train.classes), config.seed, train.classes)
        config.check_fits(model.backbone.config, config.model.name or config.model.arch)
        self.metadata = describe(model, train.classes)
        self.initial = fingerprint(model)
        image_size = model.backbone.config.image_size
        self.loader, self.tests = build_loaders(self.config, train, tests, image_size, self.processes)
        self.shown = board_images(next(iter(tests.values()), train), image_size)

        device = self.processes.device
        self.method = build_method(config.method, model).to(device).train()
        self.method.precision = config.precision
        model.backbone.recompute = config.recompute
        self.generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + self.processes.rank)
        self.graphed = self._speed_up()
        self.memory: MaskMemory | None = None
        if config.method.cam_every > 1:
            assert isinstance(self.method, CounterfactualDistiller)
            self.memory = MaskMemory(self.method, len(train), config.method.cam_every, self.processes)
        self.backward: Backward = self.method.backward
        if self.graphed:
            self.backward = GraphedBackward(self.method, self.generator)
        self.sharded = self.processes.world_size > 1 and config.parallel == "fsdp"
        if self.sharded:
            for name, manifest in tests.items():
                if len(manifest) < self.processes.world_size:
                    raise UserError(
                        f"--parallel fsdp needs an image for each of the {self.processes.world_size} processes, the "
                        f"test set {name} has {len(manifest)}"
                    )
            shard(self.method, self.processes)
        else:
            broadcast_state(self.method, self.processes)
        self.steps_per_epoch = -(-len(self.loader) // config.optim.accumulate)
        self.total_steps = self.steps_per_epoch * config.optim.epochs
        captured = self.graphed and not config.optim.cycle_beta1
        self.optimizer, self.schedule = build_optimizer(
            config.optim, self.method, self.total_steps, captured_on=device if captured else None
        )
        self.update: Callable[[], Tensor] = Graphed(self._update, self.generator) if captured else self._update

        self.step = 0
        self.best = float("-inf")
        self.accuracy: dict[str, float] = {}
        self.images_per_second = 0.0
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._sums = torch.zeros(3, device=device)  # loss, task, distill since the last line of the log
        if config.resume is not None:
            self._load(load_checkpoint(self.folder / "last.pt"))
        if self.processes.main:
            write_run_files(self.folder, self.config, device)
        self.log = RunLog(self.folder, self.step or -1) if self.processes.main else None

    def run(self) -> dict[str, float]:
        """Train to the end; return the final accuracy in percent by test set."""
        try:
            if self.step == 0:
                self._save()
                self._evaluate()
            while self.step < self.total_steps:
                self._train_epoch()
                epoch = self.step // self.steps_per_epoch
                every = self.config.eval_every
                if self.step == self.total_steps or (every and epoch % every == 0):
                    self._evaluate()
                self._save()
            student = whole(self.method.student.state_dict())
            if self.processes.main:
                save_tensors(self.folder / "model.safetensors", student, self.metadata)
            return self.accuracy
        finally:
            if self.log is not None:
                self.log.close()

    def _train_epoch(self) -> None:
        """What is left of the current epoch. Reads accumulate, log_every and checkpoint_every."""
        config = self.config
        epoch, done = divmod(self.step, self.steps_per_epoch)
        if self.memory is not None and not done:
            self.memory.start_epoch(epoch)
        batch_size = config.optim.batch_size
        left = len(self.loader) - done * config.optim.accumulate
        started, images = time.perf_counter(), 0
        micro: list[Batch] = []
        with tqdm(
            total=len(self.loader) * batch_size // config.optim.accumulate,
            initial=done * batch_size,
            desc=f"{self.title} epoch {epoch + 1}/{config.optim.epochs}".strip(),
            unit="img",
            unit_scale=True,
            disable=not self.processes.main or (self.quiet and not self.title),
            leave=False,
        ) as progress:
            for batch in self.loader:
                micro.append(batch)
                left -= 1
                if len(micro) < config.optim.accumulate and left:
                    continue
                self._optimizer_step(micro)
                count = sum(len(b.labels) for b in micro) * self.processes.world_size
                images += count
                progress.update(count)
                micro = []
                if self.step % config.log_every == 0 or not left:
                    self._write_log(images / (time.perf_counter() - started))
                if left and config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save()
        self.images_per_second = images / (time.perf_counter() - started)

    def _optimizer_step(self, micro: list[Batch]) -> None:
        """Gradients of the micro-batches, averaged; clip; update."""
        options: dict[str, Any] = {"scale": 1 / len(micro), "generator": self.generator}
        for batch in micro:
            if self.memory is None:
                out = self.backward(batch.images, batch.labels, **options)
            else:
                out = self.memory.backward(batch, **options)
            self._sums += torch.stack([out.loss, out.task, out.distill]) / len(micro)
        if not self.sharded:  # there, each backward pass has averaged its own
            average_gradients(self.method.parameters(), self.processes)
        self._watch(out.loss + whole(self.update()))
        self.step += 1
        if self.step < self.total_steps:
            self.schedule.step()

    def _update(self) -> Tensor:
        """Move weights and teacher, clear the gradients, and return what their norm was before it was clipped."""
        norm = nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.clip, foreach=True)
        self.optimizer.step()
        self.method.update_teacher()
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        return norm

    def _speed_up(self) -> bool:
        """Compile, and say whether to use CUDA graphs, as far as asked for and possible."""
        config, device = self.config, self.processes.device
        messages = []
        if config.compile:
            messages.append(compile_pointwise(self.method, device))
        refusal = None
        if config.cuda_graph:
            refusal = why_no_graph(device, self.processes.world_size, self.method)
            if refusal is None and config.method.cam_every > 1:
                refusal = NO_GRAPH
        graphed = config.cuda_graph and refusal is None
        messages += [refusal, BETA1_MOVES if graphed and config.optim.cycle_beta1 else None]
        for message in messages:
            if message and self.processes.main:
                print(message)
        return graphed

    def _watch(self, value: Tensor) -> None:
        """Remember the first step that was not finite, without waiting for the device."""
        bad = ~value.isfinite() & (self._bad_step < 0)
        self._bad_step = torch.where(bad, self.step + 1, self._bad_step)

    def _check(self) -> None:
        """Stop if any step since the start was not finite.

        Raises:
            TrainingDiverged: Naming the step, and the checkpoint that is still good.
        """
        step = int(self._bad_step)
        if step >= 0:
            raise self._diverged(f"loss or gradient is NaN or infinite at step {step}")

    def _diverged(self, what: str) -> TrainingDiverged:
        good = self.folder / "last.pt"
        kept = f"the last good checkpoint is {good}" if good.exists() else "there is no checkpoint yet"
        return TrainingDiverged(
            f"{what} of {self.total_steps}; {kept}. Lower --optim.lr ({self.config.optim.lr:g}) or "
            f"--method.weight ({self.method.weight:g})"
        )

    def _write_log(self, images_per_second: float) -> None:
        self._check()
        every = self.config.log_every
        steps = self.step % every or every
        steps = min(steps, (self.step - 1) % self.steps_per_epoch + 1)
        loss, task, distill = (self._sums / steps).tolist()
        self._sums.zero_()
        if self.log is not None:
            self.log.write(
                self.step,
                epoch=self.step / self.steps_per_epoch,
                loss=loss,
                task=task,
                distill=distill,
                lr=float(self.optimizer.param_groups[0]["lr"]),
                images_per_second=round(images_per_second, 1),
            )

    def _evaluate(self) -> None:
        """Accuracy on every test set; keeps the best epoch's weights."""
        student = self.method.student
        self.accuracy = {
            name: evaluate(student, loader, self.processes, self.config.precision)
            for name, loader in self.tests.items()
        }
        epoch = self.step // self.steps_per_epoch
        if not self.quiet:
            shown = "  ".join(f"{name} {value:.2f}" for name, value in self.accuracy.items()) or "no test sets"
            tqdm.write(f"epoch {epoch:3d}/{self.config.optim.epochs}: {shown}")
        if self.log is not None:
            self.log.write(self.step, **{f"accuracy/{name}": value for name, value in self.accuracy.items()})
        chosen = next((name for name in ("holdout", "id") if name in self.accuracy), None)
        if chosen is not None and self.accuracy[chosen] > self.best:
            self.best = self.accuracy[chosen]
            weights = whole(student.state_dict())
            if self.processes.main:
                save_tensors(self.folder / "best.safetensors", weights, self.metadata)
        generator = torch.Generator().manual_seed(self.config.seed)
        images, labels = (x.to(self.processes.device) for x in self.shown)
        rows = rows_for_board(self.method, images, labels, generator)
        if self.log is not None:
            self.log.picture(self.step, "counterfactuals", rows)

    def _save(self) -> None:
        """Write ``last.pt``, unless the run has diverged."""
        self._check()
        # An update may have ruined the weights although the loss before it was finite.
        size = torch.stack(torch._foreach_norm(list(self.method.student.parameters()))).sum()
        if not whole(size).isfinite():
            raise self._diverged(f"the weights are NaN or infinite after step {self.step}")
        states = self.processes.gather((self.loader.state_dict(), self.generator.get_state()))
        student, optimizer = whole((self.method.student.state_dict(), self.optimizer.state_dict()))
        if self.memory is not None:
            self.memory.merge()  # each epoch ends with a checkpoint, and so with what all of them know
        if self.processes.main:
            state = {
                "step": self.step,
                "best": self.best,
                "accuracy": self.accuracy,
                "initial": self.initial,
                "student": student,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "sums": self._sums,
                "loaders": [loader for loader, _ in states],
                "generators": [generator for _, generator in states],
            }
            if self.method.ema_decay and self.method.teacher is not None:
                state["teacher"] = self.method.teacher.state_dict()
            if self.memory is not None:
                state["masks"] = self.memory.state_dict()
            save_checkpoint(self.folder / "last.pt", state)
        self.processes.barrier()

    def _load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            ValueError: It is of another model, other initial weights, other data or another number of processes.
        """
        where = self.folder / "last.pt"
        if missing := STATE - (state.keys() if isinstance(state, dict) else set()):
            raise UserError(f"{where} is no checkpoint of a run: it lacks {', '.join(sorted(missing))}")
        own = self.method.student.state_dict()
        saved = {name: tensor.shape for name, tensor in state["student"].items()}
        if differing := [n for n in {**own, **saved} if n not in own or n not in saved or own[n].shape != saved[n]]:
            raise UserError(
                f"{where} is of another architecture than {self.config.model.name or self.config.model.arch}: it "
                f"differs in {', '.join(differing[:3])}{'…' if len(differing) > 3 else ''}"
            )
        if state["initial"] != self.initial:
            raise UserError(
                f"{where} started from other weights than {self.config.model.weights or self.config.model.name} now "
                "holds: restore those"
            )
        if len(state["loaders"]) != self.processes.world_size:
            raise UserError(
                f"{where} was written by {len(state['loaders'])} process(es), now there are {self.processes.world_size}"
            )
        try:
            load_model_state(self.method.student, state["student"])
            if self.method.ema_decay and self.method.teacher is not None:
                self.method.teacher.load_state_dict(state["teacher"])
            if self.memory is not None:
                self.memory.load_state_dict(state["masks"])
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.generator.set_state(state["generators"][self.processes.rank])
            self._sums.copy_(state["sums"])
            loader = state["loaders"][self.processes.rank]
            loader["settings"]
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise UserError(f"{where} is damaged ({error!r}): start the run again elsewhere") from error
        self.loader.load_state_dict(loader)
        self.step, self.best, self.accuracy = state["step"], state["best"], state["accuracy"]

    def _report_data(self, train: Any, tests: dict[str, Any]) -> None:
        if self.quiet:
            return
        for name, manifest in {"train": train, **tests}.items():
            print(f"{name}: {len(manifest)} images of {len(manifest.classes)} classes in {manifest.root}")
            if manifest.skipped:
                print(f"  skipped {len(manifest.skipped)} bad file(s):")
                for path, reason in manifest.skipped[:20]:
                    print(f"    {path}: {reason}")
