"""The one reader of pictures: bytes or a file as upright 8-bit RGB, or a reason why not."""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from ..core.errors import UserError

# Opened by PIL's own decoders alone: its EPS reader, for one, starts another program.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {"bmp", "gif", "j2k", "jp2", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"}
MOST_PIXELS = 89_478_485  # a quarter of a GiB in RGB; PIL's own warning comes at the same number
MOST_BYTES = 2**30  # of one file
LONGEST = 16  # long side : short side; the ends beyond are cut off, which no crop of a transform would show
ORIENTATION = 0x0112  # of EXIF

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}  # of 8 bits


class ImageError(UserError):
    """A file or bytes that are no usable picture; the text says why, but not which file."""


class ImageReader(ABC):
    """Reads the images of a data set by their index, in any thread or process; an error names its image."""

    upright = True  # as `read_image` takes it

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image is, for messages."""

    @abstractmethod
    def bytes_of(self, index: int) -> bytes:
        """The encoded image; an ImageError or OSError need not name it."""

    def encoded(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            ImageError: It cannot be read.
        """
        try:
            return self.bytes_of(index)
        except (ImageError, OSError) as error:
            raise ImageError(f"{self.name(index)}: {_reason(error)}") from error

    def image(self, index: int, border: int = 0) -> Image.Image:
        """The image as `read_image` gives it, ``border`` pixels cut off at each side.

        Raises:
            ImageError: It cannot be read or decoded, or has nothing inside the border.
        """
        data = self.encoded(index)
        try:
            image = read_image(data, self.upright)
            if min(image.size) <= 2 * border:
                raise ImageError(f"its sides {image.size} leave nothing inside a border of {border}")
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from error
        return image.crop((border, border, image.width - border, image.height - border)) if border else image


def read_image(source: bytes | str | os.PathLike[str], upright: bool = True) -> Image.Image:
    """Decode a picture as people look at it.

    The first frame or page, turned by the orientation that EXIF or XMP states; 16 bits scaled to 8; colours of a
    palette or of CMYK converted; alpha dropped, not blended. Of a picture longer than 16:1 only the middle 16:1.

    Args:
        source: The encoded picture, or its file.
        upright: Without it, the orientation is not looked at, but of TIFF, which PIL turns by itself.

    Returns:
        An image of mode RGB, without metadata.

    Raises:
        ImageError: It is no picture, damaged, cut short, of a kind that has no 8-bit RGB form, or too large.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageError(_too_large(f"{image.width}×{image.height}"))
            _load(image)
            return _to_rgb(image, upright)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image of a format that is read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large(f"more than {2 * MOST_PIXELS:,}")) from None
    except OSError as error:
        raise ImageError(_reason(error)) from error
    except Exception as error:  # PIL lets anything through, from SyntaxError to struct.error
        raise ImageError(f"cannot be decoded: {error or type(error).__name__}") from error


def read_file(path: str | os.PathLike[str], span: tuple[int, int] | None = None) -> bytes:
    """The bytes of a picture's file, or of a part of it.

    Args:
        path: The file.
        span: Offset and size in bytes, of an image in a tar shard.

    Raises:
        ImageError: It is no regular file (a pipe would be waited for without end), larger than 1 GiB, or has become
            shorter.
        OSError: It cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb", buffering=0) as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ImageError("not a regular file")
        offset, size = span or (0, about.st_size)
        if size > MOST_BYTES:
            raise ImageError(f"{size / 2**30:.1f} GiB are too large for a picture: at most {MOST_BYTES / 2**30:.0f}")
        file.seek(offset)
        parts, left = [], size
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    if left:
        raise ImageError(f"ends {left} bytes too early: it has become shorter, scan it again")
    return b"".join(parts)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or f"cannot be decoded: {error}"
    return str(error)


def _too_large(pixels: str) -> str:
    return f"its {pixels} pixels exceed the limit of {MOST_PIXELS:,}: make it smaller"


def _load(image: ImageFile.ImageFile) -> None:
    """Decode all of it: ``verify()`` would not notice a lost tail."""
    image.load()
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return  # 16 bits, which PIL holds in 32
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise ImageError(f"its mode {image.mode} has no 8-bit RGB form: save it as 8-bit PNG or JPEG")


def _to_rgb(image: Image.Image, upright: bool) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata of a picture that is sound
        turn = None
    if image.mode.startswith("I"):  # PIL's own conversion would clip it
        grey = np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8)
        # A TIFF whose white is 0: PIL turns it round where it has 8 bits, but not where it has 16.
        negative = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
        image = Image.fromarray(255 - grey if negative else grey)
    image.info.clear()  # what is left would turn it twice; and PIL warns about some kinds of transparency
    image = image.convert("RGB")
    if upright and turn is not None:
        image = image.transpose(turn)
    width, height = (min(side, LONGEST * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    whole = (width, height) == image.size  # a large picture is not copied once more
    return image if whole else image.crop((left, top, left + width, top + height))
