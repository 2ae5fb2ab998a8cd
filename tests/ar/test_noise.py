"""The counter-based noise: the published hash, the right distribution, no visible dependence."""

import numpy as np
import scipy.stats
import torch

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
