"""How the published test sets lie on disk, and reading each into a `Benchmark`.

Class numbers and subsets follow the data sets' papers: ImageNet-V2 (Recht et al., ICML 2019), ImageNet-R
(Hendrycks et al., ICCV 2021), ImageNet-A (Hendrycks et al., CVPR 2021), ImageNet-Sketch (Wang et al., NeurIPS 2019)
and ObjectNet (Barbu et al., NeurIPS 2019).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import UserError
from ..core.names import unknown
from ..data import Manifest, scan_images
from ..data.manifest import some
from ..data.scan import class_folders
from ..data.shards import is_shards
from ..data.verify import verified
from .benchmark import Benchmark, Reader
from .classes import WNID, class_names, data_folder, numbered_classes
from .hugging_face import read_table
from .objectnet import BORDER, find_objectnet, objectnet_meanings


@dataclass(frozen=True)
class Layout:
    """One way for a data set to lie on disk.

    Attributes:
        expects: What must be found, for messages.
        fits: Whether classes with these names are of this kind.
        read: Reads a data set of this layout.
        restricted: Whether predictions are chosen from the classes of the data set only.
        complete: Numbers of classes and images of the whole data set, where they are known.
    """

    expects: str
    fits: Callable[[Sequence[str]], bool]
    read: Callable[[Spec, Reader], Benchmark]
    restricted: bool = False
    complete: tuple[int, int] | None = None


@dataclass(frozen=True)
class Spec:
    """A data set as it is asked for: ``[NAME=][LAYOUT:]PATH``."""

    name: str
    layout: str | None
    path: Path

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read one argument of ``evaluate --data`` or ``table --test``.

        A name that is a layout's stands for that layout too. Without a name, a published data set is called by its
        layout, and any other by its folder.

        Raises:
            ValueError: Not of that form, or an unknown layout (the nearest is suggested).
        """
        # A name holds no "/", so that a path may hold "=" and ":".
        match = re.fullmatch(r"(?:([^=/]+)=)?(?:([^:/]+):)?(.+)", text)
        if match is None:
            raise UserError(f"the test set {text!r} is not of the form [NAME=][LAYOUT:]PATH")
        name, layout, path = match.groups()
        if layout is not None and layout not in LAYOUTS:
            raise unknown("layout", layout, LAYOUTS, f"test set {text}")
        if layout is None and name in LAYOUTS:
            layout = name
        published = layout is not None and LAYOUTS[layout].complete is not None
        own = data_folder(Path(path)).resolve().name
        return cls(name or (layout if published and layout else own), layout, Path(path).expanduser())

    def check_path(self) -> None:
        """Raise a FileNotFoundError or NotADirectoryError unless there is a folder, or shards to look for."""
        if is_shards(self.path):
            return
        folder = data_folder(self.path)
        if not folder.exists():
            raise FileNotFoundError(f"there is no data set folder {folder} (for {self.name}): check the path")
        if not folder.is_dir():
            raise NotADirectoryError(
                f"{self.path} (for {self.name}) is a file: pass the data set's folder, or tar shards such as "
                f"{self.path.parent}/{{000..009}}.tar"
            )


def read_benchmark(spec: Spec, reader: Reader) -> Benchmark:
    """Read a data set, of the layout given or found out.

    Raises:
        ImportError: ``datasets`` or timm is needed and not installed.
        FileNotFoundError, NotADirectoryError: No such folder.
        ValueError: Another layout than expected, bad images, or classes that the model does not know.
    """
    spec.check_path()
    found = spec.layout or detect(spec.path, reader.classes)
    layout = LAYOUTS[found]
    benchmark = layout.read(replace(spec, layout=found), reader)
    if spec.layout is None and found == "folder" and benchmark.num_classes < len(reader.classes):
        note = (
            f"{spec.name} has {benchmark.num_classes:,} classes, and predictions are chosen from all "
            f"{len(reader.classes):,} of the model; subset:{spec.path} chooses from its own."
        )
        benchmark = replace(benchmark, notes=(*benchmark.notes, note))
    if layout.complete and (benchmark.num_classes, len(benchmark)) != layout.complete:
        note = (
            f"{spec.name} has {len(benchmark):,} images of {benchmark.num_classes:,} classes here, the complete "
            f"{found} {layout.complete[1]:,} of {layout.complete[0]:,}: not comparable with published results."
        )
        benchmark = replace(benchmark, notes=(*benchmark.notes, note))
    return benchmark


def detect(root: Path, classes: Sequence[str]) -> str:
    """The layout of a data set. ImageNet's variants have the same classes, so they are told by the folder's name."""
    if find_objectnet(root):
        return "objectnet"
    if _is_table(root):
        return "hf"
    names = class_names(root)
    if names and set(names) <= set(classes):
        if not _wnids(names):
            return "folder"
        plain = re.sub(r"[^a-z0-9]", "", data_folder(root).resolve().name.lower())
        for name in ("imagenet-r", "imagenet-a", "imagenet-sketch"):
            if plain == name.replace("-", ""):
                return name
        return "imagenet-sketch" if plain == "sketch" else "folder"
    return "imagenet-v2" if names and _numbers(names) else "folder"


def _is_table(source: Path) -> bool:
    return any((data_folder(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _wnids(names: Sequence[str]) -> bool:
    return all(map(WNID.fullmatch, names))


def _numbers(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\d{1,4}", name) and int(name) < 1000 for name in names)


def _check_layout(spec: Spec) -> None:
    """Raise if the classes have other names than the layout's, saying where or what they may be."""
    assert spec.layout is not None
    layout, names = LAYOUTS[spec.layout], class_names(spec.path)
    if names and layout.fits(names):
        return
    folders = class_folders(spec.path) if spec.path.is_dir() else ()
    hint = ""
    for inner in folders[:50]:
        below = class_folders(spec.path / inner)
        if below and layout.fits(below):
            hint = f"; did you mean {spec.path / inner}?"
            break
    else:
        others = [name for name, other in LAYOUTS.items() if other.complete and names and other.fits(names)]
        hint = f"; these are the classes of {' or '.join(others)}" if others else ""
        if names and not folders:
            hint += f"; {data_folder(spec.path) / 'classes.txt'} names the classes of tar shards, one per line"
    kind = "folders" if folders else "tar shards of the classes"
    found = f"{kind} {some(names)}" if names else "no folders"
    raise UserError(f"{spec.path} is not laid out as {spec.layout}: expected {layout.expects}, found {found}{hint}")


def _read_folders(spec: Spec, reader: Reader) -> Benchmark:
    """Class folders or tar shards, with classes called as the model's are."""
    assert spec.layout is not None
    layout = LAYOUTS[spec.layout]
    if layout.complete:
        _check_layout(spec)
    source = scan_images(
        spec.path, on_bad_image=reader.on_bad_image, verify=reader.verify, progress=reader.progress
    ).with_images()
    if spec.layout == "imagenet-v2":
        # By number: folder readers sort "10" before "2".
        numbered = numbered_classes(reader.classes)
        meanings: list[tuple[str, ...]] = [(numbered[int(name)],) for name in source.classes]
    else:
        meanings = reader.translate(source.classes)
    notes = _skipped(spec, source)
    return reader.benchmark(spec.name, spec.layout, source, meanings, restricted=layout.restricted, notes=notes)


def _read_objectnet(spec: Spec, reader: Reader) -> Benchmark:
    found = find_objectnet(spec.path)
    if found is None:
        raise UserError(
            f"{spec.path} is not laid out as objectnet: expected {LAYOUTS['objectnet'].expects}, found "
            f"classes {some(class_names(spec.path)) or 'none'}"
        )
    images, mappings = found
    source = scan_images(images, on_bad_image=reader.on_bad_image, verify=False).with_images()
    meanings = objectnet_meanings(mappings, source.classes, numbered_classes(reader.classes))
    left_out = sum(not meaning for meaning in meanings)
    notes = [f"{left_out} of {len(meanings)} classes of {spec.name} are not ImageNet's: their images are left out."]
    # Before verifying: most images are of these classes.
    source = source.subset(i for i, label in enumerate(source.labels) if meanings[label])
    if reader.verify:
        source = verified(source, reader.on_bad_image, progress=reader.progress)
    notes = [*(notes if left_out else []), *_skipped(spec, source)]
    return reader.benchmark(spec.name, "objectnet", source, meanings, restricted=True, border=BORDER, notes=notes)


def _skipped(spec: Spec, source: Manifest) -> list[str]:
    """What to know of images that were left out."""
    return [f"{len(source.skipped)} files of {spec.name} are no usable images and left out."] if source.skipped else []


def _read_hugging_face(spec: Spec, reader: Reader) -> Benchmark:
    if not _is_table(spec.path):
        raise UserError(
            f"{spec.path} is not laid out as hf: expected {LAYOUTS['hf'].expects}, found "
            f"{some(sorted(path.name for path in data_folder(spec.path).iterdir())) or 'an empty folder'}"
        )
    source = read_table(spec.path, set(reader.classes) | set(reader.class_map or ()))
    if reader.verify:
        source = verified(source, reader.on_bad_image, progress=reader.progress)
    meanings, notes = reader.translate(source.classes), _skipped(spec, source)
    return reader.benchmark(spec.name, "hf", source, meanings, restricted=False, notes=notes)


_WNID_FOLDERS = "class folders called by WordNet id, such as n01440764"
LAYOUTS = {
    "imagenet": Layout(_WNID_FOLDERS, _wnids, _read_folders, complete=(1000, 50_000)),
    "imagenet-v2": Layout("class folders called by number, 0 to 999", _numbers, _read_folders, complete=(1000, 10_000)),
    "imagenet-r": Layout(_WNID_FOLDERS, _wnids, _read_folders, restricted=True, complete=(200, 30_000)),
    "imagenet-a": Layout(_WNID_FOLDERS, _wnids, _read_folders, restricted=True, complete=(200, 7_500)),
    "imagenet-sketch": Layout(_WNID_FOLDERS, _wnids, _read_folders, complete=(1000, 50_889)),
    "objectnet": Layout(
        "the folders images (class folders such as alarm_clock) and mappings", lambda _: False, _read_objectnet,
        restricted=True, complete=(113, 18_574),
    ),
    "folder": Layout("one folder per class", lambda _: True, _read_folders),
    "subset": Layout("one folder per class", lambda _: True, _read_folders, restricted=True),
    "hf": Layout("state.json, as datasets' save_to_disk writes it", lambda _: False, _read_hugging_face),
}  # fmt: skip
