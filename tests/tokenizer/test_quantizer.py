"""Bits, indices and codes."""

import pytest
import torch

from tokenizer.quantizer import (
    codes_to_indices,
    commitment_loss,
    indices_to_codes,
    quantize,
    sign,
)


@pytest.mark.parametrize("bits", [*range(1, 19), 20, 24])
def test_indices_round_trip_through_codes(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    indices = torch.randint(0, 2**bits, (3, 4, 5), generator=generator)
    indices[0, 0, :2] = torch.tensor([0, 2**bits - 1])
    codes = indices_to_codes(indices, bits)
    assert codes.shape == (3, bits, 4, 5)
    assert set(codes.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(codes_to_indices(codes), indices)


def test_channel_zero_is_the_least_significant_bit() -> None:
    code = torch.tensor([1.0, -1, -1, 1]).view(1, 4, 1, 1)
    assert codes_to_indices(code).item() == 1 + 8
    # Written out by hand: 6 = 0b110, channels from the least significant bit.
    assert indices_to_codes(torch.tensor([[[6]]]), 4).flatten().tolist() == [-1, 1, 1, -1]


def test_positions_keep_their_place_in_grids_of_any_dimension() -> None:
    z = torch.randn(2, 5, 3, 4, 6)
    indices = codes_to_indices(z)
    one = sum(2**k * int(z[1, k, 2, 3, 4] > 0) for k in range(5))
    assert indices.shape == (2, 3, 4, 6)
    assert indices[1, 2, 3, 4] == one


def test_zero_counts_as_minus_one() -> None:
    assert sign(torch.tensor([-0.5, 0.0, 1e-30])).tolist() == [-1, -1, 1]


@pytest.mark.parametrize("index", [-1, 16])
def test_an_index_outside_the_codebook_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.15"):
        indices_to_codes(torch.tensor([[[index]]]), 4)


def test_the_gradient_passes_straight_through() -> None:
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    weights = torch.randn(2, 4, 3, 3)
    (quantize(z) * weights).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, weights)


def test_commitment_pulls_towards_the_code() -> None:
    z = torch.tensor([[0.5, -2.0]], requires_grad=True)
    loss = commitment_loss(z)
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 1.0) / 2)
    assert z.grad is not None
    assert z.grad.tolist() == [[-0.5, -1.0]]
