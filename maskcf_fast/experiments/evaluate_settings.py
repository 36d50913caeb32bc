"""The settings of an evaluation; every field is a command-line option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

T = TypeVar("T")
Repeated = Annotated[tuple[tuple[T, ...], ...], tyro.conf.UseAppendAction]
"""An option that takes several values, and may come several times."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure fine-tuned models on test sets, in and out of distribution.

    Writes results.json, table.md and tradeoff.png. Results that are already in results.json are reused, unless the
    weights, the data or what decodes it have changed; so an interrupted evaluation continues when it is started again.
    """

    run: Repeated[Path] = ()
    """Folder of a training run; several are compared."""
    data: Repeated[str] = ()
    """Test sets, [NAME=][LAYOUT:]PATH. LAYOUT is imagenet, imagenet-v2, imagenet-r,
    imagenet-a, imagenet-sketch, objectnet, folder (any classes), subset (the same, predicting among its
    own classes only) or hf (a Hugging Face data set saved to disk); found out where it can be. PATH is a folder of
    class folders or of tar shards, or a pattern DIR/{000..009}.tar. Without --data, the test sets that the first run
    was trained with."""
    id: str | None = None
    """Name of the test set in distribution; by default the one of layout imagenet, else the first."""
    wise_ft: str = ""
    """Also measure (1 - α) · initial + α · fine-tuned weights, for α from FIRST:LAST:STEP (0:1:0.1) or A,B,C."""
    model_stock: bool = False
    """Also measure the Model Stock of all runs, which started from the same weights."""
    weights: Literal["auto", "final", "best"] = "auto"
    """The model after the last epoch, or of the best one; auto is best where held-out images chose it, else final."""
    baseline: Path | None = None
    """YAML or JSON file to compute effective robustness with: for each shifted test set {slope, intercept} of a line
    between logits, or a list of [ID, OOD] accuracies of ordinary models, through which it is fitted."""
    classes: str | None = None
    """Names of the model's outputs: a file with one per line, or "imagenet". By default those of the run."""
    class_map: Path | None = None
    """YAML or JSON file that gives the model's class, or a list of them, for classes that a data set calls
    otherwise."""
    outside: Literal["error", "skip"] = "error"
    """Stop at classes that the model does not know, or leave their images out."""
    out: Path | None = None
    """Folder for the results; by default evaluation/ in the first run's."""
    batch_size: int = 64
    """Images per batch and process."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """By default the run's own."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    backend: Literal["auto", "dali", "torch"] = "auto"
    """What decodes the images; auto takes DALI where it is installed."""
    threads: int = 2
    """Decoding threads, or worker processes, per process."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Stop at unreadable images, or leave them out and count them."""
    verify: bool = True
    """Decode every new image once before; what was found is remembered."""
    exif: bool | None = None
    """Turn images as the orientation in their EXIF or XMP data says; by default as the run did."""


def flat(values: tuple[tuple[T, ...], ...]) -> tuple[T, ...]:
    """All values of a `Repeated` option."""
    return tuple(value for group in values for value in group)
