"""Tar shards to test with."""

import io
import tarfile
from pathlib import Path

from maskcf_fast.data import Manifest


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, manifest: Manifest, per_shard: int) -> None:
    """The images of a folder as shards 00.tar, 01.tar, …, with their labels as .cls."""
    for number, start in enumerate(range(0, len(manifest), per_shard)):
        files = {}
        for i in range(start, min(start + per_shard, len(manifest))):
            files[f"{i:04}.jpg"] = (manifest.root / manifest.paths[i]).read_bytes()
            files[f"{i:04}.cls"] = str(manifest.labels[i]).encode()
        write_tar(folder / f"{number:02}.tar", files)
