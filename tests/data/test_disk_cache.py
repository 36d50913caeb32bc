"""What happens to a disk cache: interruption, damage, several processes; and caches that are refused."""

import multiprocessing
import os
from dataclasses import replace

import pytest
import torch

from maskcf_fast.data import LoaderConfig, build_loader, cached_loader, disk_cache, torch_loader

CONFIG = LoaderConfig(batch_size=4, image_size=8, train=False, threads=0, cache="disk")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(disk_cache, "CHUNK_BYTES", 5 * 8 * 8 * 3)  # 5 images


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The indices of the images that are decoded."""
    calls: list[int] = []
    original = torch_loader._Images.__getitem__

    def spy(self, key):
        calls.append(key[1])
        return original(self, key)

    monkeypatch.setattr(torch_loader._Images, "__getitem__", spy)
    return calls


def pixels(manifest, config=CONFIG) -> torch.Tensor:
    return torch.cat([batch.images for batch in build_loader(manifest, config, "torch")])


def chunks(cache) -> list:
    return sorted((cache / "pixels").glob("*/*.bin"))


def test_images_are_decoded_once_for_all_runs(numbered, cache, decoded):
    manifest = numbered(12)
    first = pixels(manifest)
    assert decoded == list(range(12))
    assert [path.stat().st_size for path in chunks(cache)] == [5 * 196, 5 * 196, 2 * 196]
    assert torch.equal(pixels(manifest), first)
    assert len(decoded) == 12
    image = manifest.root / manifest.paths[3]
    os.utime(image, ns=(1, 1))  # another time of change: another image
    pixels(manifest)
    assert len(decoded) == 24


def test_an_interrupted_cache_is_continued(numbered, cache, monkeypatch):
    manifest = numbered(12)
    expected = pixels(manifest, replace(CONFIG, cache="none"))
    original = torch_loader._Images.__getitem__

    def interrupt(self, key):
        if key[1] == 7:
            raise KeyboardInterrupt
        return original(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(torch_loader._Images, "__getitem__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pixels(manifest)
    assert [path.name for path in chunks(cache)] == ["000000.bin"]
    before = chunks(cache)[0].stat().st_mtime_ns
    assert torch.equal(pixels(manifest), expected)
    assert chunks(cache)[0].stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["bit", "checksum", "length"])
def test_a_damaged_chunk_is_decoded_again(numbered, cache, decoded, capsys, damage):
    manifest = numbered(12)
    expected = pixels(manifest)
    decoded.clear()
    file = chunks(cache)[1]
    content = bytearray(file.read_bytes())
    if damage == "length":
        content = content[:-1]
    else:
        content[700 if damage == "bit" else -2] ^= 1
    file.write_bytes(content)
    assert torch.equal(pixels(manifest), expected)
    assert decoded == [5, 6, 7, 8, 9]
    assert f"{file} {'has a wrong size' if damage == 'length' else 'is damaged'}" in capsys.readouterr().err
    decoded.clear()
    pixels(manifest)
    assert not decoded


def _run(manifest, rank, queue):
    disk_cache.CHUNK_BYTES = 5 * 8 * 8 * 3
    calls = []
    original = disk_cache.DiskCache._write

    def write(self, chunk, images):
        calls.append(chunk)
        original(self, chunk, images)

    disk_cache.DiskCache._write = write
    loader = build_loader(manifest, replace(CONFIG, rank=rank, world_size=2), "torch")
    queue.put((rank, calls, [y for batch in loader for y in batch.labels.tolist()]))


def test_processes_share_the_work(numbered):
    manifest = numbered(60)
    context = multiprocessing.get_context("fork")  # with what it has loaded: fast
    queue = context.Queue()
    processes = [context.Process(target=_run, args=(manifest, rank, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    assert sorted(results[0][1] + results[1][1]) == list(range(12)), "a chunk was written twice or never"
    assert results[0][2] + results[1][2] == list(range(60))


def test_refusals(numbered, monkeypatch):
    with pytest.raises(ValueError, match=r'cache="disk" keeps one version .* augment="none"'):
        replace(CONFIG, train=True, augment="crop-flip")
    with pytest.raises(ValueError, match=r"cache must be .* got 'ram'"):
        replace(CONFIG, cache="ram")
    manifest = numbered(4)
    monkeypatch.setattr(cached_loader, "free_memory", lambda device: 900)
    with pytest.raises(ValueError, match=r'4 images of 8×8 take 0.00 GiB, more than 80% .* use cache="disk"'):
        build_loader(manifest, replace(CONFIG, cache="device"), "torch")
    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"yet to be written .* MASKCF_CACHE"):
        build_loader(manifest, CONFIG, "torch")
