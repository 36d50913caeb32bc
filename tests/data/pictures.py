"""Pictures to test with."""

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise with detail at a few pixels, within [40, 215]: bicubic overshoot then stays within [0, 255]."""
    shape = (height // 4 + 2, width // 4 + 2, 3)
    noise = np.random.default_rng([seed, width, height]).integers(60, 196, shape, dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
