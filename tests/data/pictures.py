"""Pictures to test with."""

import io

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise with detail at a few pixels, within [40, 215]: bicubic overshoot then stays within [0, 255]."""
    shape = (height // 4 + 2, width // 4 + 2, 3)
    noise = np.random.default_rng([seed, width, height]).integers(60, 196, shape, dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """A file of the picture."""
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # of a copy: PIL keeps some options in the image
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    """EXIF of nothing but an orientation."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def xmp(orientation: int) -> bytes:
    return (
        b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>"
        b"<rdf:Description xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation=\"%d\"/>"
        b"</rdf:RDF></x:xmpmeta>" % orientation
    )
