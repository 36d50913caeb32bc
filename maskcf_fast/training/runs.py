"""The models of a training run: as it ended, as it began, and between the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..core.errors import UserError
from ..core.tensors import fingerprint
from ..evaluation.classes import classes_of_run
from ..methods import interpolate, model_stock
from ..models import ImageClassifier
from .build import build_model
from .checkpoint import checkpoints, load_checkpoint
from .settings import TrainConfig, parse

MOST_ALPHAS = 1000  # more are taken for a slip
WITHOUT = "leave out --wise-ft (of a table: the methods wise-ft and ensemble)"


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        name: What it is called in tables.
        folder: Its folder.
        config: Its settings.
        weights: The file of the model that is evaluated.
        classes: Names of the model's outputs.
    """

    name: str
    folder: Path
    config: TrainConfig
    weights: Path
    classes: tuple[str, ...]

    def tuned(self) -> ImageClassifier:
        """The fine-tuned classifier, on the CPU."""
        return self._build(replace(self.config, model=replace(self.config.model, weights=self.weights, head=None)))

    def initial(self) -> ImageClassifier:
        """The classifier that fine-tuning started from, built from the run's own settings.

        Raises:
            FileNotFoundError, ValueError: Its weights are no longer there, or others than the run started from.
        """
        try:
            model = self._build(self.config)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}: put back the weights that {self.folder} started from, as its config.yaml says, or {WITHOUT}"
            ) from error
        started = checkpoints(self.folder) and load_checkpoint(self.folder).values.get("initial")
        if started and started != fingerprint(model):
            source = self.config.model.weights or self.config.model.name
            raise UserError(
                f"{source} no longer holds the weights that {self.folder} started from: restore them, or {WITHOUT}"
            )
        return model

    def _build(self, config: TrainConfig) -> ImageClassifier:
        return build_model(config.model, len(self.classes), config.seed)

    def models(self, alphas: Sequence[float]) -> Iterator[tuple[float | None, ImageClassifier]]:
        """The fine-tuned classifier (None), then for each α that between the initial one (0) and it (1).

        WiSE-FT (Wortsman et al., CVPR 2022): ``(1 - α) · initial + α · fine-tuned``, weight by weight. It is one
        module throughout, whose weights change.
        """
        model = self.tuned()
        yield None, model
        if alphas:
            tuned = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
            start = self.initial().state_dict()
            for alpha in alphas:
                model.load_state_dict(interpolate(start, tuned, alpha))
                yield alpha, model


def stock(runs: Sequence[Run]) -> ImageClassifier:
    """The Model Stock of several runs from the same start (see `model_stock`), on the CPU.

    Raises:
        FileNotFoundError, ValueError: As `Run.initial`; or fewer than two runs, or ones that started otherwise.
    """
    starts = [run.initial() for run in runs]
    if other := [run for run, start in zip(runs, starts, strict=True) if fingerprint(start) != fingerprint(starts[0])]:
        raise UserError(
            f"{other[0].folder} started from other weights than {runs[0].folder}: no model stock of both; a random "
            "head is drawn by --seed, so give both runs one --model.head"
        )
    starts[0].load_state_dict(model_stock(starts[0].state_dict(), [load_file(run.weights) for run in runs]))
    return starts[0]


def read_run(
    folder: Path, weights: Literal["auto", "final", "best"] = "auto", classes: str | None = None, name: str = ""
) -> Run:
    """Open a run's folder.

    Args:
        folder: The folder.
        weights: "final" is the model after the last epoch, "best" that of the best epoch; "auto" is best where
            held-out training images chose it, as in the paper, else final: a test set must not choose the model.
        classes: Where the names of the model's outputs come from, by default its own file.
        name: What it is called in tables, by default the folder's name.

    Raises:
        FileNotFoundError: It is no run, or the run has not come that far.
        ImportError, ValueError: The class names are not to be had or do not fit, or a damaged file.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run: it has no config.yaml")
    config = parse(["--config", str(path)], name="evaluate")
    best = weights == "best" or (weights == "auto" and (config.data.holdout != 0 or config.data.val is not None))
    file = folder / ("best.safetensors" if best else "model.safetensors")
    if not file.is_file():
        started = "it has not finished: continue it with python -m maskcf_fast.train --resume" if not best else (
            "no test set or held-out images chose a best epoch: --weights final evaluates the last"
        )  # fmt: skip
        raise FileNotFoundError(f"{folder} has no {file.name}: {started}")
    try:
        with safe_open(file, "pt") as tensors:
            outputs = tensors.get_slice("head.weight").get_shape()[0]
    except SafetensorError as error:
        raise UserError(f"{file} is no complete model of a run ({error})") from error
    names = classes_of_run(file, config.data.train, outputs, classes)
    return Run(name or folder.resolve().name, folder, config, file, names)


def parse_alphas(text: str) -> tuple[float, ...]:
    """α from "first:last:step", both ends included, or from "a,b,c"; none from "".

    Raises:
        ValueError: Neither of these, more than 1000 values, or one outside [0, 1].
    """
    parts = text.replace(":", ",").split(",") if text else []
    try:
        numbers = [float(part) for part in parts]
        if ":" in text:
            first, last, step = numbers
            if not step > 0 or last < first:
                raise ValueError
            count = int(min((last - first) / step + 1e-9, MOST_ALPHAS)) + 1
            numbers = [round(first + i * step, 10) for i in range(count)]
    except ValueError:
        raise UserError(f"--wise-ft {text!r} is neither FIRST:LAST:STEP, such as 0:1:0.1, nor A,B,C") from None
    if len(numbers) > MOST_ALPHAS:
        raise UserError(f"--wise-ft {text} is more than {MOST_ALPHAS} values: take a larger STEP")
    if any(not 0 <= alpha <= 1 for alpha in numbers):
        raise UserError(f"--wise-ft {text}: every α must lie in [0, 1]")
    return tuple(sorted(set(numbers)))
