"""The training loop."""

from __future__ import annotations

import copy
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..core.errors import Stopped, UserError
from ..core.precision import check_precision, float32_products, slow_products
from ..core.processes import Processes
from ..core.schema import Range, WrongKind, conform
from ..core.signals import StopRequest
from ..data import Batch
from ..data.mixing import Mixup
from ..evaluation.measure import Percent, measure
from ..methods import CounterfactualDistiller
from ..methods.trajectory import RunningAverage
from ..models import ImageClassifier
from ..models.adapters import merged_state
from ..visualization.board import board_images, rows_for_board
from .build import as_benchmark, build_loaders, build_method, build_optimizer, describe, initial_model, scan
from .checkpoint import Checkpoint, checkpoints, load_checkpoint, save_checkpoint, update_checkpoint
from .distributed import average_gradients, broadcast_state
from .finite import NOT_FINITE, FiniteWatch
from .folder import AUTO, Lock, clean, prepare
from .log import RunLog, write_run_files
from .mask_memory import NO_GRAPH, MaskMemory
from .parts import choose_trained
from .settings import TrainConfig, changed_settings
from .sharding import fill, full, save_full, shard
from .speed import BETA1_MOVES, Backward, Graphed, GraphedBackward, compile_pointwise, why_no_graph


@dataclasses.dataclass(frozen=True)
class ProcessState:
    """What a checkpoint holds of each process."""

    loader: dict[str, Any]
    generator: bytes
    sums: tuple[float, float, float, float]


class TrainingDiverged(UserError):
    """The loss or its gradient is no longer finite."""


CHECKPOINT, STOP = 1, 2  # what a process may ask for after a step: to save, or (with a signal's number added) to end
MOST_SKIPPED = 20  # steps of a run that --on-nan skip leaves out; more is no accident
AFTER_DIVERGENCE = ("optim.lr", "optim.clip", "method.weight")  # what a run that diverged may be continued with
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Trainer:
    """One run: fine-tunes, evaluates, logs, and writes checkpoints that it can continue from exactly.

    The folder of the run holds ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``tensorboard/``,
    ``checkpoints/`` (the newest to resume from), ``best.safetensors`` (the epoch that was best on the held-out images,
    else on the in-distribution test set) and, at the end, ``model.safetensors``.

    Under another number of processes, a run that is ``elastic`` continues with the same images in the same order, in
    batches of the same size; what is drawn for each image (donors, random masks, DALI's augmentation) differs.

    Args:
        config: The settings; ``data.train`` and ``model.weights`` are given.
        processes: The processes of the run; started from the environment when None.
        quiet: Print nothing.
        title: What the progress bar says before the epoch; shows the bar in spite of ``quiet``.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: Settings, data or weights that do not fit together,
            a folder that already holds a run or is in use, or a checkpoint that is not of this run.
    """

    def __init__(
        self, config: TrainConfig, processes: Processes | None = None, *, quiet: bool = False, title: str = ""
    ) -> None:
        config.validate()
        self.processes = processes or Processes.start(config.device)
        check_precision(self.processes.device, config.precision)
        own = config.resume if config.resume != AUTO else None
        self.folder = folder = own or config.out or Path("runs") / config.method.name
        self.config = dataclasses.replace(config, out=folder, resume=None)
        self.quiet = quiet or not self.processes.main
        self.title = title
        resumed = self.processes.on_main(lambda: prepare(folder, config.resume))
        if resumed:
            free = AFTER_DIVERGENCE if (folder / NOT_FINITE).exists() else ()
            if changed := changed_settings(self.config, folder / "config.yaml", free):
                raise UserError(f"{folder} continues with its own settings only; changed: {', '.join(changed)}")

        try:
            train, tests = scan(config.data, self.processes, config.seed)
        except (FileNotFoundError, NotADirectoryError) as error:
            moved = f"; if the images have moved: --resume {folder} --data.train NEW (--data.id, --data.ood)"
            raise type(error)(f"{error}{moved if resumed else ''}") from error
        self._report_data(train, tests)
        self.sharded = self.processes.world_size > 1 and config.parallel == "fsdp"
        model, weights, self.initial = initial_model(config, train.classes, self.processes, self.sharded)
        config.check_fits(model.backbone.config, config.model.name or config.model.arch)
        self.metadata = describe(model, train.classes)
        image_size = model.backbone.config.image_size
        self.loader, self.tests = build_loaders(self.config, train, tests, image_size, self.processes)
        self.benchmarks = {name: as_benchmark(name, manifest) for name, manifest in tests.items()}
        self.images = {name: manifest.fingerprint for name, manifest in {"train": train, **tests}.items()}
        self.shown = board_images(next(iter(tests.values()), train), image_size)

        device = self.processes.device
        self.method = build_method(config.method, model).train()
        if config.optim.ema_student:
            self.method.average = copy.deepcopy(model).requires_grad_(False).eval()
        choose_trained(config.optim, model, config.seed)
        if not self.sharded:
            self.method.to(device)
        self.method.precision, self.method.keep_casts = config.precision, not self.sharded
        if config.precision == "bf16" and not config.method.ema_teacher and not self.sharded:  # FSDP takes one dtype
            self.method.narrow_teacher()
        model.backbone.recompute = config.recompute
        self.mixup = Mixup(config.data.mixup, len(train.classes)) if config.data.mixup else None
        self.generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + self.processes.rank)
        self.graphed = self._speed_up()
        self.memory: MaskMemory | None = None
        if config.method.cam_every > 1:
            assert isinstance(self.method, CounterfactualDistiller)
            self.memory = MaskMemory(self.method, len(train), config.method.cam_every, self.processes)
        self.backward: Backward = self.method.backward
        if self.graphed:
            self.backward = GraphedBackward(self.method, self.generator)
        if self.sharded:
            for name, manifest in tests.items():
                if len(manifest) < self.processes.world_size:
                    raise UserError(
                        f"--parallel fsdp needs an image for each of the {self.processes.world_size} processes, the "
                        f"test set {name} has {len(manifest)}"
                    )
            shard(self.method, self.processes)
            fill(self.method, weights, self.processes)
            del weights
        else:
            broadcast_state(self.method, self.processes)
        self.steps_per_epoch = -(-len(self.loader) // config.optim.accumulate)
        self.total_steps = config.optim.total_steps(self.steps_per_epoch)
        captured = self.graphed and not config.optim.cycle_beta1
        self.optimizer, self.schedule = build_optimizer(
            config.optim, self.method, self.total_steps, captured_on=device if captured else None
        )
        self.averages = self._running_averages()
        self.update: Callable[[], Tensor] = Graphed(self._update, self.generator) if captured else self._update

        self.step = 0
        self.evaluated = -1  # the step after which the accuracy was measured last
        self.skipped = 0
        self.best: float | None = None
        self.accuracy: dict[str, float] = {}
        self.images_per_second = 0.0
        self._finite = FiniteWatch(folder, train.paths, self.processes)
        # Since the last line of the log: loss, task, distill, and of how many steps.
        self._sums = torch.zeros(4, device=device)
        self._last_images: list[Tensor] = []
        self._signals = StopRequest()
        self._signal = 0
        self._ask = self.processes.vote()
        self._saved = -1
        self._last_save = time.monotonic()
        self.processes.on_main(lambda: self._own(config.resume, resumed))
        if resumed:
            self._load(load_checkpoint(folder, self.processes, self._say))
        if self.processes.main:
            write_run_files(folder, self.config, device)
        self.log = RunLog(folder, self.step, self.evaluated == self.step) if self.processes.main else None

    def _running_averages(self) -> list[RunningAverage]:
        """What follows the student: the teacher, if it shall, and what is kept of the student."""
        method, found = self.method, []
        if self.config.method.ema_teacher and method.teacher is not None:
            source = method.student if isinstance(method.teacher, ImageClassifier) else method.student.backbone
            found.append(RunningAverage(method.teacher, source, self.config.method.ema_teacher, self.total_steps))
        if method.average is not None:
            weights = self.config.optim.ema_student
            found.append(RunningAverage(method.average, method.student, weights, self.total_steps))
        return found

    def _own(self, resume: Path | None, resumed: bool) -> None:
        """Take the folder for this process, and tidy it up."""
        self._lock = Lock(self.folder)
        if prepare(self.folder, resume) != resumed:
            raise UserError(f"another process has just trained in {self.folder}: run the same command again")
        clean(self.folder, self.config.keep if resumed else 0)

    def run(self) -> dict[str, float]:
        """Train to the end; return the final accuracy in percent by test set.

        Raises:
            Stopped: A signal asked for it; the last step is saved.
            TrainingDiverged: Naming the step, and how to continue.
            OSError, UserError: Something that a user can mend.
        """
        try:
            with self._signals, float32_products(self.config.precision):
                if self._saved < 0:
                    self._save()
                while True:
                    if self._evaluation_is_due():
                        self._evaluate()
                        self._save()
                    if self.step == self.total_steps:
                        break
                    if self._wishes() >= STOP:
                        raise self._stopped()
                    self._train_epoch()
                    self._save()
                state = merged_state(self.method.result)
                save_full(self.folder / "model.safetensors", state, self.metadata, self.processes)
                return self.accuracy
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        finally:
            self.loader.close()
            if self.log is not None:
                self.log.close()
                self._lock.release()

    def _train_epoch(self) -> None:
        """What is left of the current epoch. Reads accumulate, log_every and when checkpoints are due."""
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
                if left:  # the end of an epoch is saved in any case
                    wishes = self._wishes()
                    if wishes >= STOP:
                        self.loader.close()  # its workers shall not outlive a grace period
                        self._save()
                        raise self._stopped()
                    if wishes == CHECKPOINT:
                        self._save()
        self.images_per_second = images / (time.perf_counter() - started)

    def _wishes(self) -> int:
        """What is to be done after this step, of which all processes get the same answer."""
        wish, every, minutes = 0, self.config.checkpoint_every, self.config.checkpoint_minutes
        if minutes and time.monotonic() - self._last_save > 60 * minutes:
            wish = CHECKPOINT
        if self._signals.received is not None:
            wish = STOP + self._signals.received
        answer = self._ask(wish)
        self._signal = answer - STOP
        return max(answer, CHECKPOINT if every and self.step % every == 0 else 0)

    def _stopped(self) -> Stopped:
        """The run ends here because of a signal, and is saved."""
        name = signal.Signals(self._signal).name
        text = (
            f"stopped by {name} after step {self.step} of {self.total_steps}, which is saved: --resume {self.folder} "
            "(or the same command with --resume auto) continues"
        )
        return Stopped(text if self.processes.main else "", 130 if self._signal == signal.SIGINT else 75)

    def _optimizer_step(self, micro: list[Batch]) -> None:
        """Gradients of the micro-batches, averaged; clip; update."""
        options: dict[str, Any] = {"scale": 1 / len(micro), "generator": self.generator}
        values = torch.zeros(3, device=self.processes.device)
        for i, (images, labels, _) in enumerate(micro):
            if self.memory is not None:
                out = self.memory.backward(micro[i], **options)
            else:
                if self.mixup is not None:
                    seed = (self.config.seed, self.processes.rank, self.step, i)
                    images, labels = self.mixup(images, labels, seed)
                out = self.backward(images, labels, **options)
            values += torch.stack([out.loss, out.task, out.distill]) / len(micro)
        if not self.sharded:  # there, each backward pass has averaged its own
            average_gradients(self.method.parameters(), self.processes)
        checked = values[0] + full(self.update())
        good = checked.isfinite()
        self._sums += torch.where(good, torch.cat([values, torch.ones_like(values[:1])]), 0.0)
        self.step += 1
        for average in self.averages:
            average.update(self.step)
        self._last_images = [batch.indices for batch in micro]
        self._finite.add(self.step, self._last_images, checked)
        if self.step < self.total_steps:
            self.schedule.step()

    def _update(self) -> Tensor:
        """Move the weights, clear the gradients, and return what their norm was before it was clipped.

        Where that is not finite, AdamW leaves the weights and its moments as they are, without asking the host.
        """
        norm = nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.clip, foreach=True)
        self.optimizer.found_inf = (~full(norm).isfinite()).to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        return norm

    def _speed_up(self) -> bool:
        """Compile, and say whether to use CUDA graphs, as far as asked for and possible."""
        config, device = self.config, self.processes.device
        messages = [slow_products(device, config.precision)]
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

    def _check(self) -> None:
        """Look at the steps since the last call: whether they were finite.

        Raises:
            TrainingDiverged: One was not, or with ``on_nan`` "skip" too many were not.
        """
        bad = self._finite.check()
        if not bad:
            return
        what = f"loss or gradient is NaN or infinite at step {bad[0]}"
        if self.config.on_nan == "stop":
            raise self._diverged(what)
        self.skipped += len(bad)
        self._say(f"{what}: it is left out; its images are in {self.folder / NOT_FINITE}")
        if self.skipped > MOST_SKIPPED:
            raise self._diverged(f"{what}, and at {self.skipped - 1} others")

    def _diverged(self, what: str) -> TrainingDiverged:
        config, saved = self.config, checkpoints(self.folder)
        kept = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        weight = f" or --method.weight {self.method.weight / 3:.2g}" if self.method.weight else ""
        skip = ", or leave single bad batches out, --on-nan skip" if config.on_nan == "stop" else ""
        return TrainingDiverged(
            f"{what} of {self.total_steps}; {kept}; the batch's images are in {self.folder / NOT_FINITE}. Continue "
            f"with less, such as --resume {self.folder} --optim.lr {config.optim.lr / 3:.2g} (was {config.optim.lr:g})"
            f"{weight}{skip}"
        )

    def _out_of_memory(self) -> UserError:
        """What needs less memory, of what is not in use yet: the two options that help most."""
        config = self.config
        images = config.optim.batch_size // (self.processes.world_size * config.optim.accumulate)
        side = self.method.student.backbone.config.image_size
        options = [
            (config.recompute is not True, "--recompute True (keeps each block's input only)"),
            (images > 2, f"--optim.accumulate {2 * config.optim.accumulate} (half as many images at once)"),
            (config.precision == "fp32", "--precision bf16"),
            (config.data.cache == "device", "--data.cache disk"),
            (self.processes.world_size > 1 and not self.sharded, "--parallel fsdp"),
        ]
        best = " and ".join([text for possible, text in options if possible][:2])
        return UserError(
            f"{self.processes.device} is out of memory with batches of {images} images of {side}×{side} pixels: try "
            f"{best or 'a smaller model'}"
        )

    def _write_log(self, images_per_second: float) -> None:
        self._check()
        *sums, steps = self.processes.sum(self._sums.clone()).tolist()
        loss, task, distill = (value / max(1, steps) for value in sums)
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

    def _evaluation_is_due(self) -> bool:
        epoch, within = divmod(self.step, self.steps_per_epoch)
        every = self.config.eval_every
        scheduled = self.step in (0, self.total_steps) or (every > 0 and epoch % every == 0)
        return not within and scheduled and self.evaluated != self.step

    def _evaluate(self) -> None:
        """Accuracy on every test set; keeps the best epoch's weights."""
        model = self.method.result
        self.accuracy = {
            name: measure(
                model, self.benchmarks[name], self._until_stopped(loader), self.processes, self.config.precision
            ).top1
            for name, loader in self.tests.items()
        }
        epoch = self.step // self.steps_per_epoch
        if not self.quiet:
            shown = "  ".join(f"{name} {value:.2f}" for name, value in self.accuracy.items()) or "no test sets"
            tqdm.write(f"epoch {epoch:3d}/{self.config.optim.epochs}: {shown}")
        if self.log is not None:
            self.log.write(self.step, **{f"accuracy/{name}": value for name, value in self.accuracy.items()})
        chosen = next((name for name in ("holdout", "id") if name in self.accuracy), None)
        # The pre-trained model is no epoch: it is not chosen, as in the paper.
        if self.step and chosen is not None and (self.best is None or self.accuracy[chosen] > self.best):
            self.best = self.accuracy[chosen]
            save_full(self.folder / "best.safetensors", merged_state(model), self.metadata, self.processes)
        generator = torch.Generator().manual_seed(self.config.seed)
        images, labels = (x.to(self.processes.device) for x in self.shown)
        rows = rows_for_board(self.method, images, labels, generator)
        if self.log is not None:
            self.log.picture(self.step, "counterfactuals", rows)
        self.evaluated = self.step

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; a process of its own need not go on with them when a signal comes, as all is saved."""
        for batch in batches:
            if self.processes.world_size == 1 and self._signals.received is not None:
                self._signal = self._signals.received
                raise self._stopped()
            yield batch

    def _save(self) -> None:
        """Write a checkpoint, unless the run has diverged."""
        self._check()
        self._last_save = time.monotonic()
        values = self._values()
        if self._saved == self.step:  # the weights are there already
            update_checkpoint(self.folder, self.step, values, self.processes)
            return
        # An update may have ruined the weights although the loss before it was finite.
        size = torch.stack(torch._foreach_norm(list(self.method.student.parameters()))).sum()
        if not full(size).isfinite():
            self._finite.record(self.step, self._last_images)
            raise self._diverged(f"the weights are NaN or infinite after step {self.step}")
        if self.memory is not None:
            self.memory.merge()  # each epoch ends with a checkpoint, and so with what all of them know
        save_checkpoint(self.folder, self.step, values, self._tensors(), self.processes, self.config.keep)
        self._saved = self.step

    def _values(self) -> dict[str, Any]:
        """What is plain of the run's state; gathered from all processes."""
        mine = {
            "loader": self.loader.state_dict(),
            "generator": self.generator.get_state().numpy().tobytes(),
            "sums": self._sums.tolist(),
        }
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "skipped": self.skipped,
            "best": self.best,
            "accuracy": self.accuracy,
            "initial": self.initial,
            "images": self.images,
            "processes": self.processes.gather(mine),
        }

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the run's state, by name."""
        tensors = {f"student.{name}": tensor for name, tensor in self.method.student.state_dict().items()}
        for average in self.averages:
            kind = "average" if average.target is self.method.average else "teacher"
            tensors |= {f"{kind}.{name}": tensor for name, tensor in average.target.state_dict().items()}
        if self.memory is not None:
            tensors |= {f"masks.{name}": tensor for name, tensor in self.memory.state_dict().items()}
        for name, parameter in self._trained():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{moment}"] = value
        return tensors

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.method.named_parameters() if p.requires_grad)

    def _load(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            ValueError: It is of another model, other initial weights or other images, or holds what no run does.
        """
        step: int = saved.value("step", Annotated[int, Range(0, self.total_steps)])
        self.evaluated = saved.value("evaluated", Annotated[int, Range(-1, step)])
        self.skipped = saved.value("skipped", Annotated[int, Range(0, step)])
        self.best = saved.value("best", Percent | None)
        self.accuracy = saved.value("accuracy", dict[str, Percent])
        states: list[ProcessState] = saved.value("processes", list[ProcessState])
        if states and len(states) != self.processes.world_size and not self.config.elastic:
            raise UserError(
                f"{saved.folder} was written by {len(states)} process(es), now there are {self.processes.world_size}: "
                "take as many, or --elastic True to continue with other draws of donors and random masks"
            )
        self._check_origin(saved)
        tensors = self._tensors()  # before the first step there are no moments among them
        for name, tensor in tensors.items():
            if not name.startswith("masks."):
                saved.fill(name, tensor)
        if self.memory is not None:
            try:
                self.memory.load_state_dict({name: saved.read(f"masks.{name}") for name in self.memory.state_dict()})
            except RuntimeError as error:
                raise saved.error(f"is damaged ({error})") from error
        self._load_moments(saved, step)
        if step:
            # One-cycle rates are a function of the step. At the last one, the schedule stays where it is.
            self.schedule.last_epoch = min(step, self.total_steps - 1) - 1
            self.schedule._step_count = step + 1
            self.schedule.step()
        rank, size = self.processes.rank, self.processes.world_size
        try:
            mine = states[rank if len(states) == size else 0]
            loader, sums = mine.loader, torch.tensor([state.sums for state in states])
            if len(states) == size:
                self.generator.set_state(torch.tensor(list(mine.generator), dtype=torch.uint8))
            else:
                own = self.loader.state_dict()["settings"]
                place = {name: own[name] for name in ("rank", "world_size", "batch_size")}
                settings = conform(loader.get("settings"), dict[str, Any], "loader: settings")
                loader = {name: loader.get(name) for name in ("epoch", "batch")} | {"settings": {**settings, **place}}
                seed = np.random.SeedSequence([self.config.seed, rank, step]).generate_state(1, np.uint64)
                self.generator.manual_seed(int(seed[0]) >> 1)
            self._sums.copy_(sums[rank] if len(states) == size else sums.sum(0) / size)
            self.loader.load_state_dict(loader)
        except (WrongKind, IndexError, RuntimeError) as error:
            raise saved.error(f"is damaged, in its state of the processes ({error})") from error
        except UserError as error:
            raise UserError(f"{saved.folder}: {error}") from error
        self.step = self._saved = step

    def _check_origin(self, saved: Checkpoint) -> None:
        """Raise unless the run started from what is here now, and on the images that are here."""
        config = self.config
        initial = saved.value("initial", str)
        own = {name: list(x.shape) for name, x in self._tensors().items() if name.startswith("student.")}
        theirs = {name: x.shape for name, x in saved.index.items() if name.startswith("student.")}
        if differing := [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]:
            raise saved.error(
                f"is of another architecture than {config.model.name or config.model.arch}: it differs in "
                f"{', '.join(differing[:3])}{'…' if len(differing) > 3 else ''}"
            )
        if initial != self.initial:
            source = config.model.weights or config.model.name
            raise UserError(f"{saved.folder} started from other weights than {source} now holds: restore those")
        images = saved.value("images", dict[str, str])
        if others := [name for name in {**images, **self.images} if images.get(name) != self.images.get(name)]:
            raise UserError(
                f"{self.folder} was run on other images than those here now: {', '.join(others)}; put those back, or "
                "start with another --out"
            )

    def _load_moments(self, saved: Checkpoint, step: int) -> None:
        """AdamW's state: of all parameters, or of none where no step was taken."""
        known = [name for name, _ in self._trained() if f"optimizer.{name}.step" in saved.index]
        if step > self.skipped and not known:
            raise saved.error("lacks the optimiser's state")
        for name, parameter in self._trained():
            if name not in known:
                continue
            state = {"step": torch.zeros((), device=self.processes.device)}
            state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS[1:]}
            for moment, value in state.items():
                saved.fill(f"optimizer.{name}.{moment}", value)
            if not 0 <= float(state["step"]) <= step:
                raise saved.error(f"is damaged, {name} had {float(state['step'])} updates in {step} steps")
            self.optimizer.state[parameter] = state

    def _say(self, text: str) -> None:
        if self.processes.main:
            tqdm.write(text)

    def _report_data(self, train: Any, tests: dict[str, Any]) -> None:
        if self.quiet:
            return
        for name, manifest in {"train": train, **tests}.items():
            print(f"{name}: {len(manifest)} images of {len(manifest.classes)} classes in {manifest.root}")
            if manifest.skipped:
                print(f"  skipped {len(manifest.skipped)} bad file(s):")
                for path, reason in manifest.skipped[:20]:
                    print(f"    {path}: {reason}")
