"""One encoded picture (PNG, JPEG, WebP, ...) to RGB uint8."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from eval.source import Batch

EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
THREADS = 8


def decode_picture(data: bytes, name: str) -> tuple[np.ndarray, str]:
    """Decode `data` and return (RGB uint8 [h, w, 3], the mode it was stored in).

    Grey, palette, CMYK and pictures with an alpha channel are converted as PIL does (alpha is
    dropped); the EXIF orientation is not applied. Both are what the established metric packages do.
    Raises ValueError naming the picture if it is broken or has more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            # PIL opens colour PNG and PPM of 16 bits as 8-bit RGB without a word; only the raw mode
            # of a tile tells, and of PPM the largest value after it.
            raw_modes = [str(tile[3]) for tile in image.tile]
            deep = image.mode[0] in "IF" or any(";16" in raw for raw in raw_modes)
            ppm: list[Any] = [tile[3] for tile in image.tile if tile[0].startswith("ppm")]
            deep |= any(largest > 255 for _, largest in ppm)
            if not deep:
                mode = image.mode
                return np.asarray(image.convert("RGB")), mode
    except UnidentifiedImageError:
        raise ValueError(f"{name}: cannot be read as a picture (unknown format)") from None
    # ValueError: colours that PIL does not convert.
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read as a picture ({error})") from None
    raise ValueError(f"{name}: more than 8 bits per channel; convert it to 8-bit RGB first")


def decode_batches(
    start: int,
    names: list[str],
    read: Callable[[int], bytes],
    labels: list[int],
    converted: Counter[str],
    indices: list[np.ndarray] | None = None,
) -> Iterator[Batch]:
    """Decode pictures start, start + 1, ... in threads and yield batches of equal size, in order.

    names, labels, indices: one entry per picture; read(i) returns the bytes of picture start + i.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        pictures = list(pool.map(lambda i: decode_picture(read(i), names[i]), range(len(names))))
    converted.update(mode for _, mode in pictures if mode != "RGB")
    for _, group in groupby(range(len(names)), key=lambda i: pictures[i][0].shape):
        members = list(group)
        yield Batch(
            images=channels_first(np.stack([pictures[i][0] for i in members])),
            cls=torch.tensor([labels[i] for i in members], dtype=torch.int64),
            keys=[names[i] for i in members],
            indices=None
            if indices is None
            else torch.from_numpy(np.stack([indices[i] for i in members])),
            start=start + members[0],
        )


def channels_first(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] to a tensor uint8 [n, 3, h, w] of its own memory."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
