"""The image transforms in PIL: what the torch loader runs, and what the DALI pipeline is tested against.

Both agree within 2 grey levels, with two exceptions, where the libraries' resampling itself differs. Beyond the
border PIL renormalises its kernel and DALI repeats the last pixel: when reducing several times over, the outer two
pixels differ by up to 5. And PIL clips to [0, 255] after each of its two passes, DALI only at the end: where hard
edges between black and white cross, a few pixels differ by about 10.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

# Share of the area, and width / height, that a random crop may have.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# Operations of RandAugment on each image, and their strength of 30: torchvision's defaults.
OPERATIONS, STRENGTH = 2, 9


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the short side to ``size`` (bicubic, antialiased) and crop the centre, as torchvision does.

    The long side is rounded down; an odd margin is halved with ties to even.

    Args:
        image: Of mode RGB, as `read_image` gives it.
        size: Side of the result, in pixels.

    Returns:
        uint8, ``[size, size, 3]``.
    """
    width, height = (side * size // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = CROP_AREA,
    ratio: tuple[float, float] = CROP_RATIO,
) -> np.ndarray:
    """Resize a random rectangle of the image to a square (bicubic, antialiased).

    Args:
        image: Of mode RGB, as `read_image` gives it.
        size: Side of the result, in pixels.
        rng: Source of the randomness.
        scale: Range of the rectangle's share of the image's area, drawn uniformly.
        ratio: Range of the rectangle's width / height, drawn uniformly in the logarithm.

    Returns:
        uint8, ``[size, size, 3]``.
    """
    for _ in range(10):
        pixels = image.width * image.height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            break
    else:  # a very long image: the largest centred rectangle whose ratio is allowed
        width = min(image.width, round(image.height * ratio[1]))
        height = min(image.height, round(image.width / ratio[0]))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    return np.array(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def randaugment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """torchvision's RandAugment of an image uint8 ``[H, W, 3]``."""
    import torch
    from torchvision.transforms import RandAugment

    with torch.random.fork_rng(devices=[]):  # it draws from the global generator
        torch.manual_seed(int(rng.integers(2**63)))
        return np.array(RandAugment(OPERATIONS, STRENGTH)(Image.fromarray(pixels)))


def random_flip(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror an image ``[H, W, C]`` left to right in half of the cases."""
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels
