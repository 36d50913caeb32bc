"""Every sample, counted over three epochs: for all backends, caches and layouts, sharded and resumed."""

import io
import itertools
from dataclasses import replace

import pytest
import torch
from tars import write_shards

from maskcf_fast.data import LoaderConfig, build_loader, scan_images

N = 23
CONFIG = LoaderConfig(batch_size=3, image_size=8, train=True, seed=7, threads=0)


@pytest.fixture(params=["none", "disk", "device"])
def cache_mode(request, monkeypatch) -> str:
    monkeypatch.setattr("maskcf_fast.data.disk_cache.CHUNK_BYTES", 5 * 8 * 8 * 3)  # 5 images per chunk
    return request.param


@pytest.fixture(params=["folder", "tar"])
def manifest(request, numbered, tmp_path):
    """N images, each of a label of its own, which is its index."""
    folder = numbered(N)
    if request.param == "folder":
        return folder
    write_shards(tmp_path / "shards", folder, per_shard=9)
    return scan_images(tmp_path / "shards")


def saved(loader) -> dict:
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training(manifest, backend, cache_mode, world):
    ranks = [replace(CONFIG, rank=rank, world_size=world, cache=cache_mode) for rank in range(world)]
    plain = build_loader(manifest, CONFIG, "torch")
    length = N // (3 * world)
    seen: list[list[list[int]]] = [[] for _ in range(3)]
    for rank, config in enumerate(ranks):
        original = build_loader(manifest, config, backend)
        assert len(original) == length
        whole = [list(original) for _ in range(3)]
        assert [len(epoch) for epoch in whole] == [length] * 3
        assert all(len(batch.labels) == 3 for epoch in whole for batch in epoch)
        assert all(torch.equal(batch.indices, batch.labels) for epoch in whole for batch in epoch)
        for epoch, batches in enumerate(whole):
            seen[epoch].append(list(itertools.chain.from_iterable(b.labels.tolist() for b in batches)))
        # Again, but stopped and resumed within the second epoch, in a loader without the cache or with it.
        first = build_loader(manifest, config, backend)
        list(first)
        steps = iter(first)
        next(steps)
        resumed = build_loader(manifest, replace(config, cache="none" if rank else cache_mode), backend)
        resumed.load_state_dict(saved(first))
        rest = [*resumed, *resumed]
        for got, expected in zip(rest, [*whole[1][1:], *whole[2]], strict=True):
            assert got.indices.tolist() == got.labels.tolist() == expected.labels.tolist()
            assert torch.equal(got.images, expected.images)
    for epoch in range(3):
        flat = list(itertools.chain.from_iterable(seen[epoch]))
        assert len(flat) == length * 3 * world
        assert len(set(flat)) == len(flat), "an image came twice"
        assert {len(part) for part in seen[epoch]} == {length * 3}
    assert len({str(epoch) for epoch in seen}) == 3
    if world == 1:  # one order for all
        assert seen[0][0] == list(itertools.chain.from_iterable(b.labels.tolist() for b in plain))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation(manifest, backend, cache_mode, world):
    config = replace(CONFIG, train=False, world_size=world, cache=cache_mode)
    uncached = build_loader(manifest, replace(config, world_size=1, cache="none"), backend)
    expected = {int(label): image for b in uncached for image, label in zip(b.images, b.labels, strict=True)}
    ranks = [build_loader(manifest, replace(config, rank=rank), backend) for rank in range(world)]
    for _ in range(3):
        batches = [batch for rank in ranks for batch in rank]
        seen = [(int(y), x) for b in batches for x, y in zip(b.images, b.labels, strict=True)]
        assert [label for label, _ in seen] == list(range(N))
        assert [i for b in batches for i in b.indices.tolist()] == list(range(N))
        assert all(torch.equal(image, expected[label]) for label, image in seen)
    steps = iter(ranks[-1])
    next(steps)
    resumed = build_loader(manifest, replace(config, rank=world - 1), backend)
    resumed.load_state_dict(saved(ranks[-1]))
    rest = [batch.labels.tolist() for batch in (*steps, *ranks[-1])]
    assert [batch.labels.tolist() for batch in (*resumed, *resumed)] == rest
