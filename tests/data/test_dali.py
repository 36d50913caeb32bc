"""DALI's pixels against PIL's, and what importing the package loads. The contract is in test_torch_loader.py."""

import subprocess
import sys

import numpy as np
import pytest
from pictures import oriented, picture
from PIL import Image

from maskcf_fast.data import LoaderConfig, build_loader, scan_images
from maskcf_fast.data.images import read_image
from maskcf_fast.data.transforms import resize_and_crop


def test_importing_the_package_loads_no_dali_and_touches_no_gpu():
    code = (
        "import sys, torch, maskcf_fast.data;"
        "assert not [name for name in sys.modules if name.startswith('nvidia.dali')];"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


pytest.importorskip("nvidia.dali")


# Sides whose scaled length or margin is odd, a half, or just below a whole number; enlarged and reduced.
SIZES = [(500, 375), (375, 500), (501, 333), (333, 777), (224, 224), (225, 226), (299, 301), (100, 80), (33, 200)]
FILES = {f"{width}x{height}.jpg": (picture(width, height), {"quality": 90}) for width, height in SIZES}
FILES |= {
    "grey.jpg": (picture(300, 410, mode="L"), {}),
    "cmyk.jpg": (picture(300, 410, mode="CMYK"), {}),
    "progressive.jpg": (picture(300, 410), {"progressive": True}),
    "palette.png": (picture(300, 410).quantize(64), {}),
    "transparent-palette.png": (picture(300, 410).quantize(64), {"transparency": 3}),
    "alpha.png": (picture(300, 410, mode="RGBA"), {}),
    "grey-alpha.png": (picture(300, 410, mode="LA"), {}),
    "grey16.png": (Image.fromarray(np.asarray(picture(300, 410, mode="L")).astype(np.uint16) * 251), {}),
    "a.bmp": (picture(300, 410), {}),
    "a.ppm": (picture(300, 410), {}),
    "a.tiff": (picture(300, 410), {"compression": "tiff_lzw"}),
    "a.webp": (picture(300, 410), {"quality": 90}),
    "a.jp2": (picture(300, 410), {}),
} | {f"exif{i}.{kind}": (picture(300, 410), {"exif": oriented(i)}) for i in range(1, 9) for kind in ("jpg", "png")}


@pytest.mark.parametrize(("size", "upright"), [(224, True), (32, True), (224, False)])
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_pixels_are_those_of_pil(tmp_path, backend, size, upright):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name, (image, options) in FILES.items():
        image.save(tmp_path / "images" / "a" / name, **options)
    manifest = scan_images(tmp_path / "images", upright=upright)
    assert len(manifest) == len(FILES)
    assert manifest.fingerprint != scan_images(tmp_path / "images", upright=not upright).fingerprint
    [batch] = build_loader(manifest, LoaderConfig(len(FILES), size, train=False, threads=1), backend)
    border = np.ones((size, size, 3), dtype=bool)
    border[2:-2, 2:-2] = False
    worst = {}
    for path, pixels in zip(manifest.paths, batch.images.numpy(), strict=True):
        difference = np.abs(resize_and_crop(read_image(manifest.root / path, upright), size).astype(int) - pixels)
        worst[path] = (difference[~border].max(), difference[border].max(), difference.mean())
    # When reducing by 7 and more, the libraries treat the border differently (see transforms.py).
    allowed = {"torch": (0, 0, 0), "dali": (2, 2 if size == 224 else 6, 0.35)}[backend]
    too_far = {path: values for path, values in worst.items() if any(np.greater(values, allowed))}
    assert not too_far


def test_hard_edges_differ_only_where_pil_clips_twice(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (60, 80, 3), dtype=np.uint8) * 255
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "images" / "a" / "x.png")
    manifest = scan_images(tmp_path / "images")
    [batch] = build_loader(manifest, LoaderConfig(1, 224, train=False, threads=1), "dali")
    image = read_image(manifest.root / manifest.paths[0])
    difference = np.abs(resize_and_crop(image, 224).astype(int) - batch.images[0].numpy())
    assert difference.mean() < 0.5
    assert (difference > 2).mean() < 0.05
