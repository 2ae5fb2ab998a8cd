"""The counter-based noise: the published hash, the right distribution, no visible dependence."""

import numpy as np
import pytest
import scipy.stats
import torch

from ar.guidance import draw
from ar.noise import exponential, mix


def test_the_hash_is_splitmix64() -> None:
    # First outputs of the published generator with seed 0, whose state grows by a constant.
    golden = 0x9E3779B97F4A7C15 - 2**64
    outputs = mix(torch.arange(3) * golden).numpy().view(np.uint64)
    assert outputs.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_noise_is_exponential() -> None:
    noise = exponential(0, torch.arange(64), 3, 4096).flatten().double().numpy()
    assert scipy.stats.kstest(noise, "expon").pvalue > 0.01
    assert (noise > 0).all()


def test_noise_is_finite_even_at_the_end_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (0, -1):  # all of them 0, all of them 1
        monkeypatch.setattr("ar.noise.mix", lambda x, bits=bits: torch.full_like(x, bits))
        noise = exponential(0, torch.arange(2), 0, 3)
        assert noise.isfinite().all() and (noise > 0).all()
        # Of several scores only one of which is allowed, that one wins.
        logits = torch.tensor([[0.0, 1.0, 2.0]] * 2)
        assert draw(logits, noise, top_k=1).tolist() == [2, 2]


def test_noise_of_different_samples_draws_and_seeds_is_uncorrelated() -> None:
    ids = torch.tensor([0, 1, 2, 2**32, 2**32 + 1])
    rows = [exponential(seed, ids, draw, 100_000) for seed in (0, 1) for draw in (0, 1)]
    correlation = np.corrcoef(torch.cat(rows).double().numpy())
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(100_000)


def test_neighbouring_tokens_are_uncorrelated() -> None:
    noise = exponential(5, torch.arange(200), 0, 1024).double()
    assert abs(np.corrcoef(noise[:, 1:].flatten(), noise[:, :-1].flatten())[0, 1]) < 0.012


def test_noise_depends_on_the_sample_not_on_its_batch() -> None:
    together = exponential(7, torch.tensor([4, 9, 11]), 2, 50)
    assert torch.equal(together[1:2], exponential(7, torch.tensor([9]), 2, 50))
