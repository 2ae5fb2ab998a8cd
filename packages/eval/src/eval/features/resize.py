"""Resizing as the reference implementations do it."""

import functools

import torch


def tf1_bilinear(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize as TensorFlow 1's `resize_bilinear` with its defaults, as in the Inception graph.

    Pixel i of the output is read at i * (in / out): corners are not aligned, there is no
    half-pixel shift and no antialiasing.

    images: float [n, c, h, w]. Returns float [n, c, size, size].
    """
    rows = _weights(images.shape[2], size).to(images)  # [size, h]
    columns = _weights(images.shape[3], size).to(images)  # [size, w]
    return rows @ images @ columns.T


@functools.lru_cache(maxsize=64)
def _weights(size_in: int, size_out: int) -> torch.Tensor:
    """The interpolation as a matrix: float64 [size_out, size_in], two weights per row."""
    # TensorFlow computes the scale and the positions in float32.
    scale = torch.tensor(size_in, dtype=torch.float32) / size_out
    position = torch.arange(size_out, dtype=torch.float32) * scale
    lower = position.floor().long().clamp(max=size_in - 1)
    upper = (lower + 1).clamp(max=size_in - 1)
    fraction = (position - lower).double()
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    row = torch.arange(size_out)
    matrix[row, lower] += 1 - fraction
    matrix[row, upper] += fraction
    return matrix
