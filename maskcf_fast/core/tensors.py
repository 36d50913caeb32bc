"""Tensors in files: safetensors that are written whole or not at all, and say if a bit of them has changed since."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UserError
from .files import atomic_write, explained, replacing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A file says twice that it carries a digest, so that no single bit hides it.
WRITER = {"writer": "maskcf_fast"}
EMPTY = "0" * 64  # what stands for the digest while it is computed
FIELD = re.compile(rb'"sha256": ?"([^"]{64})"')
LONGEST_HEADER = 100_000_000  # bytes; the format's own bound


class DamagedFile(UserError):
    """A file that is incomplete, or whose contents are no longer those that were written."""


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    read: Callable[[Tensor], Tensor] = Tensor.detach,
) -> str:
    """Write a safetensors file that carries the SHA-256 of its contents; one tensor at a time is on the CPU.

    Args:
        path: The file; on any failure the one that was there before stays.
        tensors: By name, of any device.
        metadata: Texts to store beside them.
        read: Makes of each tensor the one to write, of the same shape and dtype; called once for each, in their order.

    Returns:
        The digest, in hex.

    Raises:
        OSError: It could not be written (disk full, no permission), with the path, the size and the remedy.
    """
    header: dict[str, object] = {"__metadata__": {**(metadata or {}), **WRITER, "sha256": EMPTY}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with explained(path, len(head) + end), replacing(path) as file:
        file.write(head)
        for tensor in tensors.values():
            data = read(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        found = FIELD.search(head)
        assert found is not None
        file.seek(found.start(1))
        file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, its digest checked if it carries one.

    Raises:
        FileNotFoundError: No such file.
        DamagedFile: It is incomplete, or has changed since it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_digest(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFile(f"{path} is no complete safetensors file ({error}): convert or download it again") from error


def check_digest(path: str | os.PathLike[str], own: bool = False) -> None:
    """Raise unless a safetensors file's contents are those that were written.

    Args:
        path: The file.
        own: It is this package's, and so must carry a digest. Other libraries' files carry none.

    Raises:
        FileNotFoundError: No such file.
        DamagedFile: They are others.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    stat = os.stat(path)
    _check_digest(os.fspath(path), own, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # a model's file is read for its backbone, and again for its head
def _check_digest(path: str, own: bool, size: int, time: int) -> None:
    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), LONGEST_HEADER))
        if not own and b'"maskcf_fast"' not in head and b'"sha256"' not in head:
            return
        found = FIELD.search(head)
        digest = hashlib.sha256(b"" if found is None else _without_digest(head, found))
        while block := file.read(1 << 22):
            digest.update(block)
    if found is None or digest.hexdigest().encode() != found[1]:
        raise DamagedFile(
            f"{path} is damaged: its contents are not those that were written (SHA-256); restore it from a copy or "
            "make it again"
        )


def _without_digest(data: bytes, found: re.Match[bytes]) -> bytes:
    return data[: found.start(1)] + EMPTY.encode() + data[found.end(1) :]


def save_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file that carries the SHA-256 of its contents, bytes among them; errors as `save_tensors`."""
    text = json.dumps({"sha256": EMPTY, **content}, allow_nan=False, default=_bytes_to_json).encode()
    found = FIELD.search(text)
    assert found is not None
    digest = hashlib.sha256(text).hexdigest().encode()
    with explained(path, len(text)):
        atomic_write(path, text[: found.start(1)] + digest + text[found.end(1) :])


def load_json(path: Path) -> dict[str, object]:
    """What `save_json` wrote.

    Raises:
        FileNotFoundError: No such file.
        DamagedFile: It has changed since.
    """
    text = path.read_bytes()
    found = FIELD.search(text)
    if found is None or hashlib.sha256(_without_digest(text, found)).hexdigest().encode() != found[1]:
        raise DamagedFile(f"{path} is damaged: its contents are not those that were written (SHA-256)")
    content: dict[str, object] = json.loads(text, object_hook=_bytes_from_json)
    del content["sha256"]
    return content


def _bytes_to_json(value: object) -> dict[str, str]:
    if not isinstance(value, bytes):  # an array has bytes, too, and would come back as those
        raise TypeError(f"{type(value).__name__} does not go into JSON")
    return {"base64": base64.b64encode(value).decode()}


def _bytes_from_json(found: dict[str, object]) -> object:
    return base64.b64decode(str(found["base64"])) if found.keys() == {"base64"} else found


def fingerprint(module: nn.Module) -> str:
    """SHA-256, in hex, over a module's names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
