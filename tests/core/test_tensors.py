"""Files of tensors: what any reader of safetensors reads, and what a changed bit does."""

import errno
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from maskcf_fast.core import files
from maskcf_fast.core.tensors import DamagedFile, check_digest, load_json, load_tensors, save_json, save_tensors

STATE = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,  # not contiguous
    "half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "bits": torch.tensor([True, False]),
    "none": torch.zeros(0, 5),
}


def test_other_readers_read_it(tmp_path):
    path = tmp_path / "x.safetensors"
    digest = save_tensors(path, STATE, {"classes": '["a \\"sha256\\" b"]'})
    for read in (safetensors.torch.load_file, load_tensors):
        state = read(path)
        assert state.keys() == STATE.keys()
        assert all(torch.equal(state[name], x) and state[name].dtype == x.dtype for name, x in STATE.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"classes": '["a \\"sha256\\" b"]', "writer": "maskcf_fast", "sha256": digest}


def test_bytes_go_through_json_and_arrays_do_not(tmp_path):
    save_json(tmp_path / "x", {"a": [{"b": b"\0\xff"}]})
    for value in (np.int64(3), np.zeros(2), bytearray(b"x")):  # each has bytes, which it would come back as
        with pytest.raises(TypeError, match=f"^{type(value).__name__} does not go into JSON"):
            save_json(tmp_path / "x", {"a": value})
    assert load_json(tmp_path / "x") == {"a": [{"b": b"\0\xff"}]}


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_every_flipped_bit_is_found(tmp_path, kind):
    """In the contents, the names, the digest itself, and the marks that say that there is one."""
    path = tmp_path / "x"
    if kind == "tensors":
        save_tensors(path, {"a": torch.ones(2)}, {"b": "c"})
        load = load_tensors
    else:
        save_json(path, {"a": [1.5, None], "b": "c"})
        load = load_json
        assert load(path) == {"a": [1.5, None], "b": "c"}
    good = path.read_bytes()
    load(path)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        os.utime(path, ns=(bit, bit))  # the digest of a file is remembered by its time
        with pytest.raises(DamagedFile, match=str(path)):
            load(path)
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        os.utime(path, ns=(size, size))
        with pytest.raises(DamagedFile, match=str(path)):
            load(path)


def test_files_of_other_libraries_carry_no_digest(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(STATE | {"matrix": torch.ones(2)}, path, {"format": "pt"})
    check_digest(path)
    assert load_tensors(path)["scalar"] == 7
    with pytest.raises(DamagedFile, match=str(path)):
        check_digest(path, own=True)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent"):
        load_tensors(tmp_path / "absent")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(1)})
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*x.safetensors .*No space left on device; the one before is in"):
        save_tensors(path, {"a": torch.zeros(1)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_one_tensor_at_a_time_is_read(tmp_path):
    """A divided model is put together tensor by tensor: in their order, each once."""
    seen = []

    def read(tensor):
        seen.append(tensor)
        return torch.full_like(tensor, 3)

    state = {"b": torch.zeros(2), "a": torch.zeros(3)}
    save_tensors(tmp_path / "x", state, read=read)
    assert [len(x) for x in seen] == [2, 3]
    assert all((x == 3).all() for x in load_tensors(tmp_path / "x").values())


def test_what_a_crash_left_is_found(tmp_path):
    """`kill -9` in the middle of a write, and an exception, which leaves nothing."""
    write = files.replacing(tmp_path / "x")
    write.__enter__()
    assert len(files.temporaries(tmp_path)) == 1
    assert not write.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert files.temporaries(tmp_path) == []
