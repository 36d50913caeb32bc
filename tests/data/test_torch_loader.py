"""The contract of a loader, for both backends; and what only the torch loader has."""

import gc
import io
import itertools
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from maskcf_fast.data import LoaderConfig, LoadingError, build, build_loader, dali, scan_images
from maskcf_fast.data.torch_loader import start_workers
from maskcf_fast.data.transforms import random_resized_crop, resize_and_crop

TRAIN = LoaderConfig(batch_size=4, image_size=16, train=True, augment="crop-flip", seed=5, threads=0)
EVAL = LoaderConfig(batch_size=4, image_size=16, train=False, threads=0)


def labels_of(batches) -> list[list[int]]:
    return [batch.labels.tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def assert_same(got, expected):
    assert labels_of(got) == labels_of(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.images, b.images)


# The first is what trips DALI's own iterator: the shares differ by one, and only the smaller is whole batches.
@pytest.mark.parametrize(
    ("n", "world", "length"), [(17, 2, 2), (16, 2, 2), (23, 2, 2), (13, 3, 1), (9, 1, 2), (8, 2, 1)]
)
def test_training_epochs(numbered, backend, n, world, length):
    manifest = numbered(n)
    ranks = [build_loader(manifest, replace(TRAIN, rank=r, world_size=world), backend) for r in range(world)]
    epochs = []
    for _ in range(4):
        parts = [labels_of(rank) for rank in ranks]
        assert [[len(batch) for batch in part] for part in parts] == [[4] * length] * world
        seen = flat(flat(parts))
        assert len(set(seen)) == len(seen), "an image came twice in one epoch"
        assert set(seen) <= set(range(n))
        epochs.append(tuple(seen))
    assert [len(rank) for rank in ranks] == [length] * world
    assert len(set(epochs)) == 4, "two epochs had the same order"
    if n > length * 4 * world:
        assert len({frozenset(epoch) for epoch in epochs}) > 1, "the same images are dropped in every epoch"


@pytest.mark.parametrize(("n", "world"), [(13, 3), (9, 2), (8, 2), (3, 1), (4, 1), (2, 3)])
def test_evaluation_epochs(numbered, backend, n, world):
    manifest = numbered(n)
    ranks = [build_loader(manifest, replace(EVAL, rank=r, world_size=world), backend) for r in range(world)]
    for _ in range(3):
        parts = [labels_of(rank) for rank in ranks]
        assert flat(flat(parts)) == list(range(n))
        assert [len(part) for part in parts] == [len(rank) for rank in ranks]
        assert all(batch for part in parts for batch in part), "an empty batch"


def test_batches_keep_their_values_and_the_callers_random_state(numbered, backend):
    held, copies, state = [], [], torch.get_rng_state()
    rank = build_loader(numbered(17), replace(TRAIN, threads=1), backend)
    for _ in range(3):
        for batch in rank:
            assert batch.images.dtype == torch.uint8
            assert batch.images.shape == (4, 16, 16, 3)
            assert batch.images.is_contiguous()
            assert batch.labels.dtype == torch.int64
            assert batch.labels.shape == (4,)
            held.append(batch)
            copies.append(type(batch)(*(tensor.clone() for tensor in batch)))
    assert len(held) == 12
    assert_same(held, copies)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were taken"


@pytest.mark.parametrize("rank", [0, 1])
def test_resume_is_exact_at_every_cut(numbered, backend, rank):
    manifest = numbered(29)
    config = replace(TRAIN, rank=rank, world_size=2)  # 3 batches per epoch, one image left over
    original = build_loader(manifest, config, backend)
    states, batches = [original.state_dict()], []
    for _ in range(3):
        for batch in original:
            batches.append(batch)
            file = io.BytesIO()
            torch.save(original.state_dict(), file)
            file.seek(0)
            states.append(torch.load(file, weights_only=True))
    assert len(batches) == 9
    assert len({batch.images.numpy().tobytes() for batch in batches}) == 9
    for cut, state in enumerate(states):
        resumed = build_loader(manifest, config, backend)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest = list(resumed)
        assert len(rest) == 3 - cut % 3, "not the rest of the epoch"
        rest += resumed
        assert_same(rest[: 9 - cut], batches[cut : cut + len(rest)])


def test_resume_of_a_used_loader_with_other_threads(numbered, backend):
    manifest = numbered(13)
    original = build_loader(manifest, TRAIN, backend)
    steps = iter(original)
    next(steps)
    state = original.state_dict()
    expected = [*steps, *original]
    resumed = build_loader(manifest, replace(TRAIN, threads=2), backend)
    next(iter(resumed))
    next(iter(resumed))
    resumed.load_state_dict(state)
    assert_same([*resumed, *resumed], expected)


def test_an_abandoned_iteration_is_continued(numbered, backend):
    manifest = numbered(13)
    whole = list(build_loader(manifest, TRAIN, backend))
    interrupted = build_loader(manifest, TRAIN, backend)
    first = [next(iter(interrupted))]
    assert_same(first + list(interrupted), whole)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 2}, {"seed": 6}, {"image_size": 8}, {"augment": "none"}, {"rank": 1}, {"world_size": 3}],
    ids=str,
)
def test_state_of_other_settings_is_refused(numbered, backend, change):
    manifest = numbered(12)
    config = replace(TRAIN, world_size=2)
    state = build_loader(manifest, config, backend).state_dict()
    [name] = change
    with pytest.raises(ValueError, match=rf"another {name} \(was .*, is '?{change[name]}'?\)$"):
        build_loader(manifest, replace(config, **change), backend).load_state_dict(state)


def test_state_of_other_images_mode_or_backend_is_refused(numbered, backend):
    manifest = numbered(12)
    config = replace(TRAIN, augment="none")
    state = build_loader(manifest, config, backend).state_dict()
    fewer = replace(manifest, paths=manifest.paths[1:], labels=manifest.labels[1:])
    with pytest.raises(ValueError, match=r"another images \(was '[0-9a-f]{64}'"):
        build_loader(fewer, config, backend).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another train \(was True, is False\)"):
        build_loader(manifest, replace(config, train=False), backend).load_state_dict(state)
    with pytest.raises(ValueError, match=rf"another backend \(was 'other', is '{backend}'\)"):
        build_loader(manifest, config, backend).load_state_dict(
            {**state, "settings": {**state["settings"], "backend": "other"}}
        )


def test_seed_decides_the_order(numbered, backend):
    manifest = numbered(16)
    orders = [labels_of(build_loader(manifest, replace(TRAIN, seed=seed), backend)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_augmentation_crops_and_mirrors(tmp_path, backend):
    # Red rises to the right and green downwards, so a crop shows how large it is and whether it is mirrored.
    ramp = np.full((256, 256, 3), 128, dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(256)[:, None]
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(32):
        Image.fromarray(ramp).save(tmp_path / "images" / "a" / f"{i}.png")
    rank = build_loader(scan_images(tmp_path / "images"), replace(TRAIN, batch_size=32), backend)
    images = torch.cat([next(iter(rank)).images for _ in range(8)]).double()  # [256, 16, 16, 3]
    assert (images[:, 0, :, 1] < images[:, -1, :, 1]).all(), "upside down"
    width = (images[:, 8, -1, 0] - images[:, 8, 0, 0]) * 16 / 15
    height = (images[:, -1, 8, 1] - images[:, 0, 8, 1]) * 16 / 15
    assert 0.4 < (width < 0).double().mean() < 0.6  # mirrored
    area = width.abs() * height / 256**2
    assert 0.07 < area.min() < 0.2
    assert 0.85 < area.max() < 1.05
    assert 0.45 < area.mean() < 0.6
    ratio = width.abs() / height
    assert 0.7 < ratio.min() < 0.85
    assert 1.18 < ratio.max() < 1.42


def test_randaugment_changes_most_images_and_resumes(tmp_path, backend):
    """A plane of one colour, which crops and mirrors leave as it is; and torch's generator as well."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(32):
        Image.new("RGB", (24, 24), (120, 60, 200)).save(tmp_path / "images" / "a" / f"{i}.png")
    manifest, state = scan_images(tmp_path / "images"), torch.get_rng_state()
    loader = build_loader(manifest, replace(TRAIN, batch_size=16, augment="randaugment"), backend)
    first = next(iter(loader))
    saved = loader.state_dict()
    second = next(iter(loader))
    images = torch.cat([first.images, second.images]).double()
    changed = (images - torch.tensor([120.0, 60.0, 200.0])).abs().amax(dim=(1, 2, 3)) > 2
    assert 0.3 < changed.double().mean() < 1
    assert torch.equal(torch.get_rng_state(), state)
    resumed = build_loader(manifest, loader.config, backend)
    resumed.load_state_dict(saved)
    assert_same([next(iter(resumed))], [second])


def test_too_few_training_images(numbered, backend):
    with pytest.raises(ValueError, match=r"has 7 training images, .* 4 on each of 2 rank\(s\), 8 in all: lower"):
        build_loader(numbered(7), replace(TRAIN, world_size=2), backend)


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize(("damage", "reason"), [(b"junk", "not an image.*scan them again"), (None, "No such file")])
def test_an_image_that_is_damaged_or_gone_is_named_without_a_traceback(numbered, backend, threads, damage, reason):
    manifest = numbered(4)
    path = manifest.root / manifest.paths[2]
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(LoadingError, match=f"^{path}: {reason}") as error:
        list(build_loader(manifest, replace(EVAL, threads=threads), backend))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_without_a_gpu(numbered, backend):
    with pytest.raises(ValueError, match='device="cuda", but torch finds no usable GPU'):
        build_loader(numbered(4), replace(EVAL, device="cuda"), backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be from 1 to 1,000,000, got 0"),
        ({"image_size": 0}, "image_size must be from 1 to 10,000, got 0"),
        ({"threads": -1}, "threads must be from 0 to 512, got -1"),
        ({"threads": 100_000}, "threads must be from 0 to 512"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1, got 2"),
        ({"seed": 2**31}, "seed must be from 0"),
        ({"augment": "mixup"}, "augment must be .* got 'mixup'"),
        ({"train": False}, "unless train=True"),
        ({"device": "tpu"}, "device must be .* got 'tpu'"),
        ({"device": "meta"}, "device must be .* got 'meta'"),
    ],
)
def test_config_is_validated(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TRAIN, **change)


def test_backend_without_dali(numbered, monkeypatch, capsys):
    manifest = numbered(4)
    with pytest.raises(ValueError, match="backend must be"):
        build_loader(manifest, EVAL, "ffcv")
    monkeypatch.setattr(build, "installed", lambda _: False)
    assert build_loader(manifest, EVAL).backend == "torch"
    build_loader(manifest, replace(EVAL, rank=1, world_size=2))
    assert capsys.readouterr().err.count("DALI is not installed") == 1
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # what import then refuses
    with pytest.raises(ImportError, match="install nvidia-dali-cuda130"):
        build_loader(manifest, EVAL, "dali")
    monkeypatch.setattr(dali, "need", lambda *_, **__: None)  # as if it were installed, for another system
    with pytest.raises(ImportError, match=r'DALI cannot be imported \(.*nvidia.*\): use the loader backend "torch"'):
        build_loader(manifest, EVAL, "dali")


class Cycle:
    """Garbage that only a collector finds; says in which process."""

    def __init__(self, path):
        self.path, self.itself = path, self

    def __del__(self):
        self.path.write_text(str(os.getpid()))


class Collecting(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        gc.collect()
        return os.getpid()


def test_workers_leave_the_callers_garbage_alone(tmp_path):
    """A DALI pipeline among it would wait for ever."""
    gc.disable()
    try:
        Cycle(tmp_path / "pid")
        [pids] = start_workers(torch.utils.data.DataLoader(Collecting(), batch_size=2, num_workers=1))
        assert os.getpid() not in pids
        assert not (tmp_path / "pid").exists()
    finally:
        gc.enable()
    gc.collect()
    assert int((tmp_path / "pid").read_text()) == os.getpid()


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (33, 20), (32, 33), (35, 32), (9, 100)])
@pytest.mark.parametrize("target", [32, 15])
def test_resize_and_crop_is_torchvisions(size, target):
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = picture(*size)
    expected = transforms.center_crop(transforms.resize(image, target, transforms.InterpolationMode.BICUBIC), target)
    assert np.array_equal(resize_and_crop(image, target), np.asarray(expected))


@pytest.mark.parametrize(("size", "visible"), [((400, 10), (13, 10)), ((10, 400), (10, 13))])
def test_crop_of_a_very_long_image_is_the_centre(size, visible):
    image = picture(*size)
    left, top = (size[0] - visible[0]) // 2, (size[1] - visible[1]) // 2
    expected = image.crop((left, top, left + visible[0], top + visible[1])).resize((16, 16), Image.Resampling.BICUBIC)
    got = random_resized_crop(image, 16, np.random.default_rng(0), scale=(0.9, 1.0))
    assert np.array_equal(got, np.asarray(expected))
