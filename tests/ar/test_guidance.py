"""Guidance and restriction of scores against plain loops."""

import math

import pytest
import scipy.stats
import torch

from ar.guidance import draw, guide, restrict
from ar.noise import exponential


def naive_top_p(row: list[float], p: float) -> list[float]:
    """Keep the most likely tokens until their probability reaches p."""
    total = sum(math.exp(x) for x in row)
    kept: set[int] = set()
    mass = 0.0
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        if mass >= p:
            break
        kept.add(i)
        mass += math.exp(row[i]) / total
    return [x if i in kept else -math.inf for i, x in enumerate(row)]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_shortest_sufficient_list(p: float) -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 2
    expected = torch.tensor([naive_top_p(row, p) for row in logits.double().tolist()])
    assert torch.equal(restrict(logits, top_p=p), expected.float())


def test_top_k_keeps_the_k_highest_scores() -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    for k in (1, 5, 29):
        kept = restrict(logits, top_k=k)
        for row, kept_row in zip(logits.tolist(), kept.tolist(), strict=True):
            threshold = sorted(row)[-k]
            assert kept_row == [x if x >= threshold else -math.inf for x in row]
    assert torch.equal(restrict(logits, top_k=0), logits)
    assert torch.equal(restrict(logits, top_k=30), logits)


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    # After top-k 2 the shares are 4/7 and 3/7: 0.5 is reached by the first alone.
    assert torch.isfinite(restrict(logits, top_k=2, top_p=0.5)).tolist() == [[True] + 3 * [False]]
    assert torch.isfinite(restrict(logits, top_p=0.5)).tolist() == [[True, True, False, False]]


def test_guidance_extrapolates_from_unconditional_to_conditional() -> None:
    logits = torch.randn(6, 5)
    conditional, unconditional = logits[:3], logits[3:]
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guide(logits, 2.5, rows=3), expected)
    assert torch.equal(guide(logits, 1.0, rows=3), conditional)
    assert torch.equal(guide(conditional, 2.5, rows=3), conditional)


def test_draws_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count, temperature = 20_000, 2.0
    logits = (probabilities.log() * temperature).expand(count, 4)
    tokens = draw(logits, exponential(0, torch.arange(count), 0, 4), temperature)
    observed = torch.bincount(tokens, minlength=4)
    expected = probabilities * count
    assert scipy.stats.chisquare(observed.numpy(), expected.double().numpy()).pvalue > 0.01


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.randn(10, 7)
    assert torch.equal(draw(logits, None, temperature=0), logits.argmax(-1))
