"""Test sets for one list of classes, and what models come to on them, each measured once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tqdm import tqdm

from ..core.errors import UserError
from ..core.names import unknown
from ..core.processes import Processes
from ..core.tensors import fingerprint
from ..data import Batch, Loader, LoaderConfig, build_loader
from ..data.manifest import some
from ..models import Backbone
from .benchmark import Benchmark, Reader
from .layouts import Spec, read_benchmark
from .measure import Measurement, measure
from .results import Results


def choose_specs(texts: Sequence[str], id: str | None, own: Mapping[str, Path]) -> list[Spec]:
    """The test sets that are asked for.

    Args:
        texts: Each ``[NAME=][LAYOUT:]PATH``.
        id: Name of the one in distribution, if it is said.
        own: What training was tested on, by name, which is taken if there are no ``texts``.

    Raises:
        OSError: One of them is not there.
        ValueError: Two of the same name, an unknown layout, or an ``id`` that is none of them.
    """
    specs = [Spec.parse(text) for text in texts]
    specs = specs or [Spec(name, None, path) for name, path in own.items()]
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several test sets are called {some(twice)}: name them, NAME=PATH")
    for spec in specs:
        spec.check_path()
    if specs and id is not None:
        check_known("--id", [id], names)
    return specs


def check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ValueError that suggests the nearest if one of ``names`` is no test set's."""
    for name in names:
        if name not in known:
            raise unknown("test set", name, known, what)


class Suite:
    """Some test sets, read for one list of classes.

    Args:
        specs: The test sets. One process looks into them first and remembers what it found; the others read that.
        reader: The classes, and what to do about images that do not fit.
        results: What was measured before, and where to keep what is measured now.
        processes: The processes that share the images.
        id: Name of the test set in distribution; by default the one of layout imagenet, else the first.
        batch_size: Images per batch and process.
        threads: Decoding threads, or worker processes, per process.
        backend: What decodes the images.

    Raises:
        ImportError, OSError, ValueError: See `read_benchmark`.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        reader: Reader,
        results: Results,
        processes: Processes,
        *,
        id: str | None = None,
        batch_size: int = 64,
        threads: int = 2,
        backend: Literal["auto", "dali", "torch"] = "auto",
    ) -> None:
        self.results, self.processes = results, processes
        self.batch_size, self.threads, self.backend = batch_size, threads, backend
        if not processes.main:
            processes.barrier()
        self.benchmarks = [read_benchmark(spec, reader) for spec in specs]
        if processes.main:
            processes.barrier()
        published = [b.name for b in self.benchmarks if b.layout == "imagenet"]
        self.id = id or (published[0] if published else self.benchmarks[0].name)

    def on(self, *benchmarks: Benchmark) -> Suite:
        """The same for other test sets."""
        other = copy.copy(self)
        other.benchmarks, other.id = list(benchmarks), benchmarks[0].name
        return other

    @property
    def shifted(self) -> list[str]:
        """Names of the test sets out of distribution."""
        return [b.name for b in self.benchmarks if b.name != self.id]

    def measure(self, model: nn.Module, precision: str, title: str, /, **about: Any) -> dict[str, Measurement]:
        """A model's results by test set; what is known already is not measured again.

        Args:
            model: An `ImageClassifier`, or made of several; it is moved to the device.
            precision: "fp32", "tf32" or "bf16".
            title: What the model is called in messages.
            **about: What the file of results says of it.

        Raises:
            LoadingError: An image could not be read.
            ValueError: The model gave outputs that are not finite.
        """
        state = f"{_identity(model)[:32]}-{precision}"
        model = model.to(self.processes.device)
        results = {}
        for i, benchmark in enumerate(self.benchmarks):
            loader = self._loader(model, benchmark)
            key = f"{state}-{benchmark.fingerprint[:32]}-{loader.decoder}"  # decoders differ by a rounding
            found = self.results.find(key)
            result = found
            if result is None:
                progress = f"{title}: {benchmark.name} ({i + 1}/{len(self.benchmarks)})"
                batches = self._shown(loader, len(benchmark), progress)
                try:
                    result = measure(model, benchmark, batches, self.processes, precision)
                except ValueError as error:
                    raise UserError(f"{title} on {benchmark.name}: {error}") from error
                self.results.add(key, result, **about, data=benchmark.name)
            interval = f"[{result.low:.2f}, {result.high:.2f}]{'' if found is None else ' (reused)'}"
            self._say(f"{title}  {benchmark.name}: {result.top1:.2f} % {interval}")
            results[benchmark.name] = result
        return results

    def describe(self) -> None:
        """Say what the test sets are."""
        for b in self.benchmarks:
            within = f", predictions among {int(b.allowed.sum()):,} classes" if b.restricted else ""
            role = "in distribution" if b.name == self.id else "shifted"
            what = f"{len(b):,} images of {b.num_classes:,} classes{within}"
            self._say(f"{b.name} ({b.layout}, {role}): {what} in {b.source.root}")
            for note in b.notes:
                self._say(f"  {note}")

    def summary(self) -> list[dict[str, Any]]:
        """The test sets as plain values."""
        return [
            {
                "name": b.name,
                "layout": b.layout,
                "path": str(b.source.root),
                "images": len(b),
                "classes": b.num_classes,
                "outputs": int(b.allowed.sum()),
                "notes": b.notes,
            }
            for b in self.benchmarks
        ]

    def _loader(self, model: nn.Module, benchmark: Benchmark) -> Loader:
        settings = LoaderConfig(
            batch_size=self.batch_size,
            image_size=_backbones(model)[0].config.image_size,
            train=False,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            threads=self.threads,
            device=str(self.processes.device),
            border=benchmark.border,
        )
        return build_loader(benchmark.source, settings, self.backend)

    def _shown(self, batches: Iterable[Batch], total: int, title: str) -> Iterator[Batch]:
        """The batches, with a progress bar over all processes' images."""
        with tqdm(
            total=total, desc=title, unit="img", unit_scale=True, leave=False, disable=not self.processes.main
        ) as bar:
            for batch in batches:
                yield batch
                bar.update(min(len(batch.labels) * self.processes.world_size, total - bar.n))

    def _say(self, text: str) -> None:
        if self.processes.main:
            tqdm.write(text)


def _backbones(model: nn.Module) -> list[Backbone]:
    return [module for module in model.modules() if isinstance(module, Backbone)]


def _identity(model: nn.Module) -> str:
    """SHA-256, in hex, of all that a model's outputs depend on: its kinds of modules, architecture and weights."""
    kinds = [type(module).__name__ for module in model.modules()]
    return hashlib.sha256(
        f"{kinds} {[backbone.config for backbone in _backbones(model)]} {fingerprint(model)}".encode()
    ).hexdigest()
