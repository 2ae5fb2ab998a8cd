"""Layers of the encoder and the decoder (reference: Open-MAGVIT2, Section 3.1).

Everything is written over "the dimensions after the channels", so that a layer for images and one
for videos differ in its convolution only. Shape suffixes: B batch, C channels, K codebook bits;
`...` is the grid (h, w). Parameter names follow the published checkpoints.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group norm of a residual block or of an output layer."""
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, plus the input (through 1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, ...]` to `[B, out_channels, ...]`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


def residual_blocks(in_channels: int, out_channels: int, count: int, groups: int) -> nn.Sequential:
    """`count` residual blocks; the first one changes the width."""
    widths = [in_channels] + [out_channels] * count
    return nn.Sequential(*(ResidualBlock(widths[i], widths[i + 1], groups) for i in range(count)))


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift, one per channel and image, come from the quantized latent.

    out = (W_gamma sigma + b_gamma) GN(x) + (W_beta mu + b_beta), with mu and sigma the mean and the
    (unbiased) standard deviation of each latent channel over the grid. The paper shows one per
    residual block; the published models have one at the entry of each decoder level.
    """

    def __init__(self, channels: int, bits: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.gamma = nn.Linear(bits, channels)
        self.beta = nn.Linear(bits, channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Normalise `x` `[B, C, ...]` under `code` `[B, K, ...]` (-1 / +1, the decoder's input)."""
        code_BKn = code.flatten(2)
        # One position has no unbiased variance; the original yields NaN there, we take 0.
        variance_BK = code_BKn.var(dim=2, correction=min(1, code_BKn.shape[2] - 1))
        gain = self.gamma((variance_BK + NORM_EPS).sqrt())
        shift = self.beta(code_BKn.mean(dim=2))
        grid = [1] * (x.ndim - 2)
        return F.group_norm(x, self.groups, eps=NORM_EPS) * gain.view(
            *gain.shape, *grid
        ) + shift.view(*shift.shape, *grid)


class Upsample(nn.Module):
    """Convolution to 4 C channels, then depth-to-space: twice the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, 2h, 2w]`."""
        return depth_to_space(self.conv1(x), (2, 2))


def depth_to_space(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Move channels into the grid, block-major: out[c, 2h+i, 2w+j] = in[(2i+j) C + c, h, w].

    This is the order of the published checkpoints; `torch.pixel_shuffle` is channel-major, in[c 4 +
    2i+j, h, w].

    Args:
        x: `[B, prod(factors) * C, *grid]`.
        factors: enlargement of each grid dimension.
    """
    batch, _, *grid = x.shape
    dims = len(factors)
    blocks = x.view(batch, *factors, -1, *grid)
    order = [0, dims + 1]  # batch, channels
    for d in range(dims):
        order += [dims + 2 + d, 1 + d]  # grid dimension, then its sub-position
    size = [n * f for n, f in zip(grid, factors, strict=True)]
    return blocks.permute(order).reshape(batch, -1, *size)
