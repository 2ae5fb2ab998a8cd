"""Counter-based random numbers: noise as a pure function of (seed, sample, draw), on any device.

Integer arithmetic gives the same bits everywhere, so a sample depends neither on the batch it is
drawn in, nor on the number of processes, nor on any generator's state. The hash is splitmix64, in
int64 (products wrap as in uint64).
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign in."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mix(x: Tensor) -> Tensor:
    """Return the splitmix64 output for state `x` (int64, any shape)."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def exponential(seed: int, ids_B: Tensor, draw: int, size: int) -> Tensor:
    """Return independent Exp(1) numbers for draw number `draw` of each sample, fp32 `[B, size]`.

    Args:
        ids_B: int64, what names each sample.
    """
    state = mix(mix(mix(torch.full_like(ids_B, seed)) ^ ids_B) + draw)
    counter = torch.arange(size, device=ids_B.device) * _GOLDEN
    bits = _shift(mix(state[:, None] + counter), 32)
    # (bits + 1/2) / 2^32 in (0, 1). Small values, which decide an argmax, keep full precision; the
    # largest would round to 1 and give infinity, with which the only token allowed would not win.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-uniform)
