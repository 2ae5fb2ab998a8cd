"""The factorised entropy against the definition: a softmax over all 2^K codes."""

import math

import pytest
import torch
from torch import Tensor

from tokenizer.entropy import lfq_entropy


def brute_force(z_NK: Tensor, temperature: float, eps: float) -> tuple[Tensor, Tensor]:
    """Sample and batch entropy from the dense softmax of 2 <z, c> / tau over every code c."""
    bits = z_NK.shape[1]
    numbers = torch.arange(2**bits)
    codes = ((numbers[:, None] >> torch.arange(bits)) & 1).to(z_NK.dtype) * 2 - 1
    log_p = (2 * z_NK @ codes.T / temperature).log_softmax(1)
    sample = -(log_p.exp() * log_p).sum(1).mean()
    mean = log_p.exp().mean(0)
    return sample, -(mean * (mean + eps).log()).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize(("temperature", "eps"), [(0.01, 1e-5), (1.0, 1e-5), (0.3, 0.0)])
def test_entropy_equals_brute_force_in_value_and_gradient(
    bits: int, temperature: float, eps: float
) -> None:
    generator = torch.Generator().manual_seed(bits)
    spread = 1.0 if temperature == 1.0 else 0.05
    z = spread * torch.randn(37, bits, generator=generator, dtype=torch.float64)
    ours, truth = z.clone().requires_grad_(), z.clone().requires_grad_()
    entropy = lfq_entropy(ours, temperature, eps)
    sample, batch = brute_force(truth, temperature, eps)
    assert entropy.sample.item() == pytest.approx(sample.item(), abs=1e-10)
    assert entropy.batch.item() == pytest.approx(batch.item(), abs=1e-10)
    (gradient,) = torch.autograd.grad(entropy.sample - 0.7 * entropy.batch, ours)
    (expected,) = torch.autograd.grad(sample - 0.7 * batch, truth)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_uniform_latents_have_the_entropy_of_the_whole_codebook() -> None:
    entropy = lfq_entropy(torch.zeros(4, 18), eps=0.0)
    assert entropy.sample.item() == pytest.approx(18 * math.log(2), rel=1e-6)
    assert entropy.batch.item() == pytest.approx(18 * math.log(2), rel=1e-6)


def test_the_default_eps_lowers_the_ceiling_as_in_the_original() -> None:
    assert lfq_entropy(torch.zeros(4, 18)).batch.item() == pytest.approx(11.19, abs=0.005)
    assert lfq_entropy(torch.zeros(4, 14)).batch.item() == pytest.approx(9.55, abs=0.005)


def test_confident_latents_have_finite_gradients() -> None:
    z = (3 * torch.randn(64, 18, generator=torch.Generator().manual_seed(0))).requires_grad_()
    entropy = lfq_entropy(z)
    (entropy.sample - entropy.batch).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert entropy.sample.item() < 0.1
    assert entropy.batch.item() == pytest.approx(math.log(64), abs=0.2)


def test_autocast_does_not_lower_the_precision() -> None:
    z = 0.05 * torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    plain, cast = z.clone().requires_grad_(), z.clone().requires_grad_()
    lfq_entropy(plain).batch.backward()
    with torch.autocast("cpu", torch.bfloat16):
        lfq_entropy(cast).batch.backward()
    assert plain.grad is not None
    assert cast.grad is not None
    assert torch.equal(plain.grad, cast.grad)


def test_no_tensor_of_positions_times_codes_is_made() -> None:
    """Every tensor kept for the backward pass is far smaller than N x 2^K."""
    positions, bits = 256, 18
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lfq_entropy(0.05 * torch.randn(positions, bits, requires_grad=True))
    assert largest <= max(positions * 2 ** (bits // 2), 2**bits)
