"""The exact entropy term of LFQ (Eq. 3 of the paper) without ever building an N x 2^K tensor.

With p(c | z) = softmax_c(2 <z, c> / tau) over all codes c in {-1, +1}^K the softmax is a product of
K Bernoullis, p(b_k = 1) = sigmoid(4 z_k / tau). So the entropy of a sample is a sum of K binary
entropies, and the distribution averaged over N positions is one matrix product Hi^T Lo / N of the
two half-code tables, `[N, 2^(K - K/2)]` and `[N, 2^(K/2)]`. Time O(N 2^K) in one matrix product,
memory O(N 2^(K/2) + 2^K).

Shape suffixes: N positions, K codebook bits, L = 2^(K/2) low half codes, H = 2^(K - K/2) high half
codes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Entropy:
    """Entropies in nats, scalars with gradient."""

    sample: Tensor  # mean entropy of p(c | z): small when every position is confident
    batch: Tensor  # entropy of the mean of p(c | z): large when all codes are used


def lfq_entropy(
    z_NK: Tensor, temperature: float = 0.01, eps: float = 1e-5, across_processes: bool = False
) -> Entropy:
    """Return the sample and the batch entropy of latents `[N, K]`.

    Args:
        z_NK: latents before quantization, one row per position. Computed in float32 (or float64 if
            given so) whatever the autocast state: the two gradients nearly cancel for confident
            positions, and TF32 or bf16 would ruin the rest.
        temperature: tau of the softmax; 0.01 in all published models.
        eps: added inside the outer logarithm of the batch entropy. The original's 1e-5 exceeds
            2^-18, which lowers the ceiling for K = 18 from 12.48 to 11.19 nats; it is kept for
            parity, 0 gives the true entropy.
        across_processes: average the code distribution over all processes, so that the batch
            entropy is that of the global batch (the original uses each process's own batch).
    """
    with torch.autocast(z_NK.device.type, enabled=False):
        logits_NK = (z_NK if z_NK.dtype == torch.float64 else z_NK.float()) * (4.0 / temperature)
        magnitude_NK = logits_NK.abs()
        # Binary entropy of sigmoid(l): softplus(-|l|) + |l| sigmoid(-|l|), exact for confident bits
        # too.
        binary_NK = F.softplus(-magnitude_NK) + magnitude_NK * torch.sigmoid(-magnitude_NK)

        half = logits_NK.shape[1] // 2
        low_NL, high_NH = _code_table(logits_NK[:, :half]), _code_table(logits_NK[:, half:])
        mean_HL = _Float32Product.apply(high_NH, low_NL) / len(z_NK)
        if across_processes and dist.is_initialized():
            mean_HL = _MeanOverProcesses.apply(mean_HL)
        # xlogy-like: a code of probability 0 adds 0, also for eps = 0.
        log_HL = torch.log(
            mean_HL.clamp_min(torch.finfo(mean_HL.dtype).tiny) if eps == 0 else mean_HL + eps
        )
        return Entropy(sample=binary_NK.sum(1).mean(), batch=-(mean_HL * log_HL).sum())


def _code_table(logits_NM: Tensor) -> Tensor:
    """Return the joint probability of every combination of M independent bits, `[N, 2^M]`, bit 0
    fastest.

    Built from sigmoid(+l) and sigmoid(-l): a softmax over <z, c> would lose the gradient to
    cancellation at logits near 1000.
    """
    one_NM, zero_NM = torch.sigmoid(logits_NM), torch.sigmoid(-logits_NM)
    table = logits_NM.new_ones(len(logits_NM), 1)
    for k in range(logits_NM.shape[1]):
        table = torch.cat([table * zero_NM[:, k : k + 1], table * one_NM[:, k : k + 1]], dim=1)
    return table


class _Float32Product(torch.autograd.Function):
    """high^T low in true float32 (no TF32, no autocast), forward and backward."""

    @staticmethod
    def forward(ctx: Any, high_NH: Tensor, low_NL: Tensor) -> Tensor:
        ctx.save_for_backward(high_NH, low_NL)
        with _true_float32():
            return high_NH.T @ low_NL

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        high_NH, low_NL = ctx.saved_tensors
        (grad_HL,) = grad_outputs
        with _true_float32(), torch.autocast(grad_HL.device.type, enabled=False):
            return low_NL @ grad_HL.T, high_NH @ grad_HL


class _MeanOverProcesses(torch.autograd.Function):
    """Mean of a tensor over all processes, each of which computes the same function of it.

    The gradient of that function is then equal everywhere, and is passed on as it is: averaging
    parameter gradients over the processes, as DDP does, completes the chain rule.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


@contextmanager
def _true_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
