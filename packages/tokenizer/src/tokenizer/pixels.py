"""Where pixel range is decided: uint8 RGB outside the model, float in [-1, 1] inside."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """Map uint8 pixels 0..255 to float32 in [-1, 1] (x / 127.5 - 1); any shape."""
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 in 0..255, got {images.dtype}")
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Map float pixels to uint8, clipping to [-1, 1] and rounding to the nearest level; any shape.

    The original code truncates instead, which costs 63 of the 256 levels a round trip.
    """
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
