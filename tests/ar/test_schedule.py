"""The learning rate at chosen steps, weight decay groups, and the optimizer's round trip."""

from collections.abc import Callable

import pytest
import torch

from ar.config import OptimConfig
from ar.model import AR
from ar.schedule import (
    build_optimizer,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
    parameter_groups,
)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.005),  # warm-up: 100 steps
        (50, 0.5025),
        (100, 1.0),
        (344, 1.0),  # 5 % of the 4900 steps after it
        (345, 1.0),
        (2550, 0.1 + 0.9 * 0.5 / 0.95),
        (5000, 0.1),
    ],
)
def test_learning_rate_of_the_paper(step: int, factor: float) -> None:
    rate = learning_rate(step, 5000, OptimConfig(lr=2e-4))
    assert rate == pytest.approx(2e-4 * factor, rel=1e-9)


def test_norm_gains_decay_only_on_request(make_model: Callable[..., AR]) -> None:
    model = make_model()
    gains = sum(p.ndim == 1 for p in model.parameters())
    matrices, plain = parameter_groups(model, OptimConfig())
    assert (matrices["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert len(plain["params"]) == gains == 9  # type: ignore[arg-type]
    (everything,) = parameter_groups(model, OptimConfig(decay_all=True))
    assert len(everything["params"]) == len(list(model.parameters()))  # type: ignore[arg-type]


def test_optimizer_state_survives_flattening(make_model: Callable[..., AR]) -> None:
    models = [make_model(), make_model()]
    optimizers = [build_optimizer(model, OptimConfig()) for model in models]

    def update(index: int, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in models[index].parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers[index].step()

    update(0, seed=1)
    models[1].load_state_dict(models[0].state_dict())
    tensors = {k: v.clone() for k, v in optimizer_tensors(optimizers[0], models[0]).items()}
    assert "spatial_blocks.0.attention.wo.weight.exp_avg_sq" in tensors
    load_optimizer(optimizers[1], models[1], tensors)
    update(0, seed=2)
    update(1, seed=2)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
