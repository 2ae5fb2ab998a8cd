"""One encoded picture to 8-bit RGB, with a decision for every odd kind (see docs/data.md)."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What counts as a picture by its name; the content decides how it is read.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)

# A strip such as 1 x 10,000 would become gigabytes once its shorter side is resized.
MAX_ASPECT_RATIO = 32


class UnreadablePicture(Exception):
    """A picture that cannot be used; the text is a short reason that can be counted."""


def decode_picture(data: bytes, *, exif_orientation: bool) -> Image.Image:
    """Return the RGB picture in `data`; of an animation, the first frame.

    Raises:
        UnreadablePicture: with the reason, if there is no picture that can be used.
    """
    if not data:
        raise UnreadablePicture("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # odd EXIF, sizes between the warning and the limit of Pillow
            image: Image.Image = Image.open(io.BytesIO(data))
            image.load()
            if exif_orientation:
                image = ImageOps.exif_transpose(image)
            image = _to_rgb(image)
    except UnreadablePicture:
        raise
    except UnidentifiedImageError:
        raise UnreadablePicture("not a picture") from None
    except Image.DecompressionBombError:
        raise UnreadablePicture("too many pixels") from None
    except Exception as error:  # Pillow's plugins raise a dozen types on damaged files
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise UnreadablePicture(reason) from error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UnreadablePicture(f"longer than {MAX_ASPECT_RATIO} times its width")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode: transparency over white, 16 bits scaled to 8, the rest as Pillow has it."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise UnreadablePicture("floating-point pixels")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadablePicture("more than 16 bits per pixel")
    # 65535 / 257 = 255: full white stays full white. Pillow's own conversion would clip at 255.
    grey = ((values + 128) // 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
