"""Discriminators and their losses: PatchGAN (Isola et al. 2017), the blur discriminator of MaskBit
(Weber et al. 2024), hinge and non-saturating losses, LeCAM (Tseng et al. 2021).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import LossConfig


class PatchGAN(nn.Module):
    """One real/fake logit per patch: 4x4 convolutions, batch norm, leaky ReLU.

    Parameter names follow the original.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        main: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            main += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        main.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*main)
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        """Float pixels `[B, 3, H, W]` in [-1, 1] to logits `[B, 1, h, w]`."""
        return self.main(x)

    def min_size(self) -> int:
        """Smallest image side that leaves at least one logit."""
        size = 1
        for layer in reversed(self.main):
            if isinstance(layer, nn.Conv2d):
                size = (
                    (size - 1) * layer.stride[0] + layer.kernel_size[0] - 2 * int(layer.padding[0])
                )
        return size


def _init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


class Blur(nn.Module):
    """Halve height and width after a 4x4 binomial blur (1, 3, 3, 1), each channel by itself."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / 64)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, ceil(h / 2), ceil(w / 2)]`."""
        channels = x.shape[1]
        top, left = ((side + 1) // 2 * 2 + 2 - side for side in x.shape[2:])  # zeros in all
        x = F.pad(x, (left // 2, left - left // 2, top // 2, top - top // 2))
        return F.conv2d(x, self.kernel.expand(channels, 1, 4, 4), stride=2, groups=channels)


class BlurDiscriminator(nn.Module):
    """Patch discriminator that blurs before it subsamples, with group norm: no batch statistics.

    The published 2^14 text-image tokenizer was trained with it (128 channels, three layers).
    """

    def __init__(self, channels: int = 128, layers: int = 3) -> None:
        super().__init__()
        widths = [channels, *(channels * 2**i for i in range(layers))]
        self.block_in = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 3, padding=1),
                    Blur(),
                    nn.GroupNorm(32, widths[i + 1]),
                    nn.LeakyReLU(0.1),
                )
                for i in range(layers)
            )
        )
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(widths[-1], 1, 5, padding=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Float pixels `[B, 3, H, W]` in [-1, 1] to logits `[B, 1, h, w]`."""
        return self.to_logits(self.blocks(self.block_in(x)))

    def min_size(self) -> int:
        """Smallest image side of which every layer still sees more than one pixel."""
        return 2 ** len(self.blocks)


def build_discriminator(config: LossConfig) -> PatchGAN | BlurDiscriminator:
    """Build the discriminator that `config` describes."""
    kind = PatchGAN if config.discriminator == "patchgan" else BlurDiscriminator
    return kind(config.discriminator_channels, config.discriminator_layers)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of the patch-averaged logit: mean softplus(-mean D(x_hat)). Scalar."""
    return F.softplus(-fake_logits.flatten(1).mean(1)).mean()


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator's hinge loss per patch, halved as in the original. Scalar."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


class LeCam(nn.Module):
    """LeCAM regulariser; its moving averages of the mean logits belong to the training state."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def update(self, real_mean: Tensor, fake_mean: Tensor, share: float = 1.0) -> None:
        """Advance the averages by mean logits, taken over all processes.

        Args:
            share: what part of a step they are of, so that the averages reach back the same number
                of steps however these are cut into micro-batches.
        """
        weight = 1.0 - self.decay**share
        self.real.lerp_(real_mean.detach().to(self.real), weight)
        self.fake.lerp_(fake_mean.detach().to(self.fake), weight)

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """mean relu(D(x) - ema_fake)^2 + mean relu(ema_real - D(x_hat))^2, after `update`."""
        return (
            F.relu(real_logits - self.fake).square().mean()
            + F.relu(self.real - fake_logits).square().mean()
        )
