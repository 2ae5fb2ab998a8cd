"""Outputs of the original Open-MAGVIT2 code for seeded weights and inputs, and the published sizes.

Every weight is drawn from a generator seeded with the CRC-32 of its checkpoint key, every input
from one seeded with the CRC-32 of a tag, so that both can be made again here. `golden.json` holds
what the original computed from them in float32.
"""

import json
import zlib
from pathlib import Path

import lpips
import pytest
import torch
from torch import Tensor, nn

from tokenizer.autoencoder import Reconstruction, Tokenizer
from tokenizer.config import LossConfig, ModelConfig
from tokenizer.discriminator import BlurDiscriminator, LeCam, PatchGAN, generator_loss, hinge_loss
from tokenizer.entropy import lfq_entropy
from tokenizer.losses import GeneratorObjective
from tokenizer.quantizer import codes_to_indices, commitment_loss

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
CONFIGS = {"256": ModelConfig(), "128": ModelConfig(multipliers=[1, 2, 2, 4])}


def seeded(model: nn.Module, prefix: str = "") -> nn.Module:
    """Fill the weights of `model`, named `prefix` + name, as for the golden values."""
    state = model.state_dict()
    for name, tensor in state.items():
        key = prefix + name
        if not tensor.is_floating_point() or key.endswith(
            ("running_mean", "running_var", "shift", "scale", ".kernel")
        ):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        draw = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            state[name] = draw / (tensor.numel() / tensor.shape[0]) ** 0.5
        else:
            state[name] = 1 + 0.1 * draw if key.endswith("weight") else 0.1 * draw
    model.load_state_dict(state)
    return model


def seeded_input(tag: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(tag.encode()))
    return torch.rand(shape, generator=generator) * 2 - 1


def assert_matches(tensor: Tensor, golden: dict) -> None:
    assert list(tensor.shape) == golden["shape"]
    flat = tensor.flatten()
    scale = golden["absmax"]
    torch.testing.assert_close(flat[:8], torch.tensor(golden["first8"]), rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(flat[-4:], torch.tensor(golden["last4"]), rtol=0, atol=1e-4 * scale)
    assert flat.mean().item() == pytest.approx(golden["mean"], abs=1e-5 * scale)
    assert flat.std().item() == pytest.approx(golden["std"], rel=1e-4)
    assert flat.abs().max().item() == pytest.approx(golden["absmax"], rel=1e-4)


@pytest.mark.parametrize("size", CONFIGS)
def test_encoder_and_decoder_equal_the_original(size: str) -> None:
    golden = GOLDEN[f"image_{size}"]
    tokenizer = seeded(Tokenizer(CONFIGS[size])).eval()
    with torch.no_grad():
        latent = tokenizer.encoder(seeded_input(f"image{size}", 2, 3, 64, 96))
        decoded = tokenizer.decoder(seeded_input(f"bits{size}", 1, 18, 4, 4).sign())
    assert_matches(latent, golden["latent"])
    assert_matches(decoded, golden["decoded_from_bits"])
    # The smallest latent of the 128 case is 6e-5: its sign is safe, so all indices must be equal.
    assert codes_to_indices(latent).flatten(1).tolist() == golden["indices"]


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "total"),
    [
        (CONFIGS["256"], 49_751_442, 65_376_387, 115_127_829),
        (CONFIGS["128"], 48_422_162, 63_599_491, 112_021_653),
        (ModelConfig(bits=14), 49_749_390, 65_344_643, 115_094_033),
    ],
)
def test_parameter_counts_are_the_published_ones(
    config: ModelConfig, encoder: int, decoder: int, total: int
) -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer(config)

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(tokenizer.encoder) == encoder
    assert count(tokenizer.decoder) == decoder
    assert count(tokenizer) == total


@pytest.fixture
def discriminator() -> nn.Module:
    return seeded(PatchGAN(), "loss.discriminator.").train()


def test_discriminator_and_gan_losses_equal_the_original(discriminator: nn.Module) -> None:
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    real = discriminator(seeded_input("image256", 2, 3, 64, 96))
    fake = discriminator(seeded_input("rec", 2, 3, 64, 96))
    assert_matches(real.detach(), GOLDEN["discriminator"]["real"])
    assert_matches(fake.detach(), GOLDEN["discriminator"]["fake"])

    golden = GOLDEN["gan_losses"]
    lecam = LeCam()
    lecam.update(real.mean(), fake.mean())
    assert generator_loss(fake).item() == pytest.approx(golden["g"], rel=1e-5)
    assert hinge_loss(real, fake).item() == pytest.approx(golden["d_hinge"], rel=1e-5)
    assert lecam(real, fake).item() == pytest.approx(golden["lecam_after_one_update"], rel=1e-5)
    assert lecam.real.item() == pytest.approx(golden["ema_real"], rel=1e-4)
    assert lecam.fake.item() == pytest.approx(golden["ema_fake"], rel=1e-4)


def test_blur_discriminator_equals_the_original() -> None:
    discriminator = BlurDiscriminator()
    kernel = discriminator.blocks[0][1].kernel
    assert kernel.flatten().tolist() == GOLDEN["blur_kernel"]
    assert sum(p.numel() for p in discriminator.parameters()) == 1_909_889
    seeded(discriminator).eval()
    with torch.no_grad():
        logits = discriminator(seeded_input("image256", 2, 3, 64, 96))
    assert_matches(logits, GOLDEN["blur_discriminator"])


def test_entropy_and_commitment_equal_the_original() -> None:
    z = 0.05 * seeded_input("lfq", 2, 18, 4, 4)
    entropy = lfq_entropy(z.movedim(1, -1).flatten(0, -2))
    golden = GOLDEN["lfq"]
    assert entropy.sample.item() == pytest.approx(golden["per_sample"], rel=1e-5)
    assert entropy.batch.item() == pytest.approx(golden["codebook"], rel=1e-5)
    assert commitment_loss(z).item() == pytest.approx(golden["commit"], rel=1e-5)
    assert codes_to_indices(z).flatten(1).tolist() == golden["idx"]


def test_total_objective_equals_the_original(discriminator: nn.Module) -> None:
    perceptual = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False).eval()
    # lpips lists its linear layers twice: as lin0 .. lin4, and as lins.0 .. lins.4 (the same
    # tensors).
    seeded(perceptual.net, "loss.perceptual_loss.net.")
    for i, layer in enumerate(perceptual.lins):
        seeded(layer, f"loss.perceptual_loss.lin{i}.")
    image, fake = seeded_input("image256", 2, 3, 64, 96), seeded_input("rec", 2, 3, 64, 96)
    latent = 0.05 * seeded_input("lfq", 2, 18, 4, 4)
    with torch.no_grad():
        assert perceptual(image, fake).flatten().tolist() == pytest.approx(
            GOLDEN["lpips"], rel=1e-4
        )
        objective = GeneratorObjective(LossConfig(), perceptual)
        loss = objective(image, Reconstruction(fake, latent), discriminator, step=0)
    assert loss.total.item() == pytest.approx(GOLDEN["total"]["generator"], rel=1e-5)
