"""Each weight of the objective does what it says."""

import math
from pathlib import Path

import pytest
import torch

from tokenizer.autoencoder import Reconstruction
from tokenizer.config import LossConfig, OptimConfig
from tokenizer.discriminator import Blur, LeCam, PatchGAN
from tokenizer.losses import GeneratorObjective, entropy_weight, perceptual_loss
from tokenizer.schedule import lr_scheduler

WEIGHTS = {
    "l1_weight": "l1",
    "perceptual_weight": "lpips",
    "adversarial_weight": "generator",
    "commitment_weight": "commitment",
}


class MeanDifference(torch.nn.Module):
    """Stands in for LPIPS."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).square().mean((1, 2, 3))


def total_and_parts(config: LossConfig) -> tuple[float, dict[str, float]]:
    torch.manual_seed(0)
    image, output = torch.rand(2, 3, 24, 24), torch.rand(2, 3, 24, 24)
    latent = 0.1 * torch.randn(2, 6, 4, 4)
    judge = PatchGAN(channels=4).eval()
    objective = GeneratorObjective(config, MeanDifference() if config.perceptual_weight else None)
    critic = judge if config.adversarial_weight else None
    loss = objective(image, Reconstruction(output, latent), critic, step=0)
    return loss.total.item(), {name: part.item() for name, part in loss.parts.items()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_scales_its_own_part_of_the_total(name: str) -> None:
    total, parts = total_and_parts(LossConfig())
    changed, _ = total_and_parts(LossConfig(**{name: 0.5}))
    expected = total + (0.5 - getattr(LossConfig(), name)) * parts[WEIGHTS[name]]
    assert changed == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "sample", "batch"),
    [
        (LossConfig(), 0.1, -0.1),
        (LossConfig(entropy_weight=0.3), 0.3, -0.3),
        (LossConfig(sample_entropy_weight=2.0), 0.2, -0.1),
        (LossConfig(batch_entropy_weight=0.0), 0.1, 0.0),
        (LossConfig(entropy_anneal_factor=1.0), 0.2, -0.2),
    ],
)
def test_entropy_weights_enter_as_documented(
    config: LossConfig, sample: float, batch: float
) -> None:
    total, parts = total_and_parts(config)
    rest = sum(getattr(config, weight) * parts[part] for weight, part in WEIGHTS.items())
    expected = rest + sample * parts["sample_entropy"] + batch * parts["batch_entropy"]
    assert total == pytest.approx(expected, abs=1e-6)


def test_entropy_temperature_and_eps_reach_the_entropy() -> None:
    _, sharp = total_and_parts(LossConfig())
    _, soft = total_and_parts(LossConfig(entropy_temperature=1.0))
    _, exact = total_and_parts(LossConfig(entropy_eps=0.0))
    assert soft["sample_entropy"] > 2 * sharp["sample_entropy"]
    assert exact["batch_entropy"] > sharp["batch_entropy"]


def test_a_part_of_weight_zero_is_not_computed() -> None:
    _, parts = total_and_parts(
        LossConfig(perceptual_weight=0, adversarial_weight=0, commitment_weight=0, entropy_weight=0)
    )
    assert set(parts) == {"l1"}


def test_the_entropy_weight_falls_linearly_to_its_value() -> None:
    config = LossConfig(entropy_anneal_factor=2.0, entropy_anneal_steps=100)
    weights = [entropy_weight(config, step) for step in (0, 50, 100, 500)]
    assert weights == pytest.approx([0.3, 0.2, 0.1, 0.1])


def test_missing_perceptual_weights_are_explained(tmp_path: Path) -> None:
    config = LossConfig(perceptual_backbone=str(tmp_path / "vgg16.pth"))
    with pytest.raises(ValueError, match=r"loss\.perceptual_weight=0"):
        perceptual_loss(config)
    assert perceptual_loss(LossConfig(perceptual_weight=0)) is None


@pytest.mark.parametrize("content", [b"no weights", b"", {"a": 1.0}, {"features.0.weight": 1.0}])
def test_a_file_without_the_perceptual_weights_is_refused_by_name(
    tmp_path: Path, content: bytes | dict[str, float]
) -> None:
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({name: torch.tensor(value) for name, value in content.items()}, path)
    with pytest.raises(ValueError, match=r"loss\.perceptual_backbone=.*other\.pth"):
        perceptual_loss(LossConfig(perceptual_backbone=str(path)))


def test_perceptual_backbone_is_read_from_a_file(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    torch.manual_seed(0)
    backbone = vgg16(weights=None).features.state_dict()
    state = {f"features.{name}": tensor for name, tensor in backbone.items()}
    torch.save(state, tmp_path / "vgg16.pth")
    lpips = perceptual_loss(LossConfig(perceptual_backbone=str(tmp_path / "vgg16.pth")))
    assert lpips is not None
    loaded = lpips.net.state_dict()
    assert torch.equal(loaded["slice3.14.weight"], backbone["14.weight"])
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    image = torch.rand(1, 3, 32, 32)
    assert lpips(image, image).item() == 0


def test_lecam_averages_move_as_far_in_micro_batches_as_in_one() -> None:
    whole, cut = LeCam(), LeCam()
    whole.update(torch.tensor(1.0), torch.tensor(-2.0))
    for _ in range(4):
        cut.update(torch.tensor(1.0), torch.tensor(-2.0), share=1 / 4)
    assert whole.real.item() == pytest.approx(0.001, rel=1e-4)
    assert cut.real.item() == pytest.approx(whole.real.item(), rel=1e-4)
    assert cut.fake.item() == pytest.approx(whole.fake.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["l1_weight", "entropy_weight", "lecam_weight"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"loss.{name}=-1"):
        LossConfig(**{name: -1.0})


def rates(config: OptimConfig, steps: list[int], total_steps: int) -> list[float]:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = lr_scheduler(optimizer, config, total_steps)
    result = []
    for step in steps:
        scheduler.step_update(step)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_learning_rate_drops_at_the_given_steps() -> None:
    config = OptimConfig(lr=1.0, schedule="step", decay_steps=[10, 20], warmup_steps=5)
    steps = [0, 1, 4, 5, 9, 10, 19, 20, 100]
    expected = [0.0, 0.2, 0.8, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert rates(config, steps, 100) == pytest.approx(expected)
    # A pure function of the step: another order gives the same values.
    assert rates(config, steps[::-1], 100) == pytest.approx(expected[::-1])


def test_learning_rate_follows_a_cosine_after_the_warm_up() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10, min_lr=0.01)
    steps = [0, 5, 10, 35, 60, 109]
    expected = [0.0, 0.5] + [
        0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)) for step in steps[2:]
    ]
    assert rates(config, steps, 110) == pytest.approx(expected)


def test_a_constant_learning_rate_stays() -> None:
    assert rates(OptimConfig(lr=1.0, warmup_steps=2), [1, 2, 999], 1000) == [0.5, 1.0, 1.0]


def test_the_blur_halves_any_side_and_keeps_a_flat_picture() -> None:
    out = Blur()(torch.ones(1, 3, 9, 12))
    assert out.shape == (1, 3, 5, 6)
    assert out[:, :, 1:-1, 1:-1] == pytest.approx(1.0)  # away from the zeros of the padding
    # One bright pixel spreads by the taps 1 3 3 1, of which every second is kept.
    spot = torch.zeros(1, 1, 8, 8)
    spot[0, 0, 4, 4] = 64.0
    assert Blur()(spot)[0, 0, 1:4, 1:4].tolist() == [[1, 3, 0], [3, 9, 0], [0, 0, 0]]
