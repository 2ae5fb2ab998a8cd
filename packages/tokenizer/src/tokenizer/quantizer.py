"""Look-up-free quantization (LFQ, Section 3.1 of the paper): the sign of each latent channel is one
bit of the code.

Conventions, decided here and nowhere else: bit k of a position is 1 iff channel k is > 0; codes are
-1 / +1 along the channel dimension; `index = sum_k 2^k b_k` (Eq. 2), so channel 0 is the least
significant bit.

Shape suffixes: B batch, K codebook bits, ... any grid (h, w or t, h, w).
"""

import torch
from torch import Tensor

MAX_BITS = 24  # the exact entropy keeps a vector of 2^K probabilities


def quantize(z: Tensor) -> Tensor:
    """Return the -1 / +1 codes of latents `[B, K, ...]`; the gradient passes straight through."""
    return z + (sign(z) - z).detach()


def sign(z: Tensor) -> Tensor:
    """Return +1 where `z > 0` and -1 elsewhere (zero included), in the dtype of `z`."""
    return torch.where(z > 0, 1.0, -1.0).to(z.dtype)


def commitment_loss(z: Tensor) -> Tensor:
    """Mean of (z - sign(z))^2: pulls the latents towards their codes. Scalar."""
    return (z - sign(z)).square().mean()


def codes_to_indices(codes: Tensor) -> Tensor:
    """Map codes (or latents) `[B, K, ...]` to indices int64 `[B, ...]` in 0 .. 2^K - 1 (Eq. 2)."""
    bits = codes.shape[1]
    weights = 2 ** torch.arange(bits, device=codes.device, dtype=torch.int64)
    return torch.einsum("bk...,k->b...", (codes > 0).long(), weights)


def indices_to_codes(indices: Tensor, bits: int) -> Tensor:
    """Map indices `[B, ...]` to codes float32 `[B, bits, ...]` of -1 / +1.

    Raises:
        ValueError: an index is negative or not below 2^bits.
    """
    if indices.numel() and (indices.min() < 0 or indices.max() >= 2**bits):
        raise ValueError(
            f"token indices must lie in 0..{2**bits - 1} for a codebook of {bits} bits, "
            f"got {indices.min().item()}..{indices.max().item()}"
        )
    shifts = torch.arange(bits, device=indices.device).view(bits, *[1] * (indices.ndim - 1))
    return ((indices.long().unsqueeze(1) >> shifts) & 1).float() * 2.0 - 1.0
