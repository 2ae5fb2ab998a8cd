"""Step-by-step sampling against the full forward pass, and its independence of batches."""

from collections.abc import Callable

import pytest
import torch

from ar.config import ModelConfig, SamplingConfig, resolve_model
from ar.model import AR
from ar.sampler import Decoder, sample

PLAIN = SamplingConfig(scale=[1.0, 1.0])


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [[4, 4], [2, 5]])
def test_cached_scores_equal_those_of_the_full_forward(
    make_model: Callable[..., AR], grid: list[int]
) -> None:
    model = make_model(grid=grid)
    labels = torch.tensor([0, 3, -1])
    tokens = torch.randint(0, 64, (3, model.num_positions))
    pre, post = model.split(tokens)
    with torch.inference_mode():
        full = model(tokens, labels)
        decoder = Decoder(model, rows=3)
        x = model.class_emb(labels)
        for position in range(model.num_positions):
            assert_near(decoder.pre_logits(x), full.pre[:, position])
            pre_embedding = model.pre_emb(pre[:, position])
            assert_near(decoder.post_logits(pre_embedding), full.post[:, position])
            x = pre_embedding + model.post_emb(post[:, position])


@pytest.mark.parametrize("scale", [[1.0, 1.0], [2.0, 3.0], [1.0, 2.0], [2.0, 1.0]])
def test_an_image_is_the_same_in_any_batch(
    make_model: Callable[..., AR], scale: list[float]
) -> None:
    model = make_model()
    sampling = SamplingConfig(scale=scale, temperature=[1.1, 0.9], top_k=[0, 9], top_p=[0.9, 1.0])
    labels, ids = torch.arange(20) % 4, torch.arange(20) * 31

    def in_batches(size: int) -> torch.Tensor:
        parts = zip(labels.split(size), ids.split(size), strict=True)
        return torch.cat([sample(model, label, ident, sampling, seed=3) for label, ident in parts])

    together = in_batches(20)
    assert torch.equal(in_batches(1), together)
    assert torch.equal(in_batches(7), together)
    assert not torch.equal(sample(model, labels, ids, sampling, seed=4), together)
    assert len({tuple(row) for row in together.tolist()}) == 20


def test_greedy_sampling_takes_the_argmax_of_guided_scores(make_model: Callable[..., AR]) -> None:
    model = make_model()
    scale = [1.5, 2.5]
    sampling = SamplingConfig(scale=scale, temperature=[0.0, 0.0])
    labels = torch.tensor([2, 0])
    tokens = sample(model, labels, torch.tensor([0, 1]), sampling, seed=0)
    with torch.inference_mode():
        conditional, unconditional = model(tokens, labels), model(tokens, torch.tensor([-1, -1]))
    for slot, chosen in enumerate(model.split(tokens)):
        guided = unconditional[slot] + scale[slot] * (conditional[slot] - unconditional[slot])
        assert torch.equal(guided.argmax(-1), chosen)


def test_without_guidance_only_conditional_rows_are_computed(
    make_model: Callable[..., AR], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    original = Decoder.__init__

    def record(self: Decoder, model: AR, n: int) -> None:
        rows.append(n)
        original(self, model, n)

    monkeypatch.setattr(Decoder, "__init__", record)
    labels, ids = torch.tensor([1, 2, 3]), torch.arange(3)
    sample(make_model(), labels, ids, PLAIN, seed=0)
    sample(make_model(), labels, ids, SamplingConfig(scale=[1.0, 2.0]), seed=0)
    sample(make_model(num_classes=0), labels * 0 - 1, ids, SamplingConfig(), seed=0)
    assert rows == [3, 6, 3]


def test_samples_follow_the_models_distribution(make_model: Callable[..., AR]) -> None:
    """The joint frequencies of the two sub-tokens against exact probabilities."""
    model = make_model(grid=[1, 1], sub_token_bits=[1, 2])
    count = 4000
    tokens = sample(model, torch.full((count,), 2), torch.arange(count), PLAIN, seed=0)[:, 0]
    every = torch.arange(8)[:, None]
    with torch.inference_mode():
        scores = model(every, torch.full((8,), 2))
    pre, post = model.split(every[:, 0])
    joint = scores.pre[:, 0].softmax(-1).gather(1, pre[:, None])
    joint = (joint * scores.post[:, 0].softmax(-1).gather(1, post[:, None]))[:, 0]
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    observed = torch.bincount(tokens, minlength=8) / count
    sigma = (joint * (1 - joint) / count).sqrt()
    assert ((observed - joint).abs() < 4 * sigma + 1e-6).all()


def test_bf16_weights_sample_with_exact_positions(make_model: Callable[..., AR]) -> None:
    model = make_model().cast_weights(torch.bfloat16)
    assert model.rotary.dtype == torch.float32
    tokens = sample(model, torch.tensor([0, 1]), torch.arange(2), SamplingConfig(), seed=0)
    assert tokens.shape == (2, 16) and tokens.min() >= 0 and tokens.max() < 64


def test_a_model_in_training_mode_is_refused() -> None:
    config = resolve_model(ModelConfig(dim=32, num_heads=2, num_layers=1), 6, (2, 2), 2)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        sample(AR(config).train(), torch.tensor([0]), torch.tensor([0]), SamplingConfig(), seed=0)
