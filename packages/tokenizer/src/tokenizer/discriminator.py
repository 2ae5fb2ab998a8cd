"""PatchGAN discriminator (Isola et al. 2017) and LeCAM regulariser (Tseng et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
