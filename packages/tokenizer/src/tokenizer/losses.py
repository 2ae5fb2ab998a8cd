"""The training objective: L1 + LPIPS + adversarial + entropy + commitment (Section 3.1 of the
paper).

The discriminator's side is in discriminator.py; the entropy in entropy.py. Pixels are float in [-1,
1].
"""

import warnings
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.autoencoder import Reconstruction
from tokenizer.config import LossConfig
from tokenizer.discriminator import generator_loss
from tokenizer.entropy import lfq_entropy
from tokenizer.quantizer import commitment_loss


@dataclass(frozen=True)
class GeneratorLoss:
    """The scalar to minimise and its detached parts, unweighted, by their names in the log."""

    total: Tensor
    parts: dict[str, Tensor]


class GeneratorObjective(nn.Module):
    """What the autoencoder is trained for. `perceptual` is LPIPS, or None where its weight is 0."""

    def __init__(self, config: LossConfig, perceptual: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.perceptual = perceptual

    def forward(
        self, image: Tensor, output: Reconstruction, discriminator: nn.Module | None, step: int
    ) -> GeneratorLoss:
        """Return the loss of a reconstruction of `image` `[B, 3, H, W]`.

        Args:
            discriminator: judges the reconstruction; None leaves the adversarial part out.
            step: training step, for the annealing of the entropy weight.
        """
        config = self.config
        parts = {"l1": F.l1_loss(output.image, image)}
        total = config.l1_weight * parts["l1"]
        if self.perceptual is not None:
            parts["lpips"] = self.perceptual(output.image, image).mean()
            total = total + config.perceptual_weight * parts["lpips"]
        if discriminator is not None:
            parts["generator"] = generator_loss(discriminator(output.image).float())
            total = total + config.adversarial_weight * parts["generator"]
        if config.commitment_weight:
            parts["commitment"] = commitment_loss(output.latent.float())
            total = total + config.commitment_weight * parts["commitment"]
        if config.entropy_weight:
            latent_NK = output.latent.movedim(1, -1).flatten(0, -2)
            across = config.entropy_scope == "global"
            entropy = lfq_entropy(latent_NK, config.entropy_temperature, config.entropy_eps, across)
            parts["sample_entropy"], parts["batch_entropy"] = entropy.sample, entropy.batch
            total = total + entropy_weight(config, step) * (
                config.sample_entropy_weight * entropy.sample
                - config.batch_entropy_weight * entropy.batch
            )
        return GeneratorLoss(total, {name: part.detach() for name, part in parts.items()})


def entropy_weight(config: LossConfig, step: int) -> float:
    """Weight of the entropy term at `step`, annealed linearly from (1 + factor) times its value."""
    remaining = max(0.0, 1.0 - step / config.entropy_anneal_steps)
    return config.entropy_weight * (1.0 + config.entropy_anneal_factor * remaining)


def perceptual_loss(config: LossConfig) -> nn.Module | None:
    """Return LPIPS (v0.1, VGG-16, frozen, eval mode) for inputs in [-1, 1], or None where its
    weight is 0.

    Raises:
        ValueError: the VGG-16 weights cannot be had; the message says how to get them or to do
            without.
    """
    if not config.perceptual_weight:
        return None
    import lpips  # imported here: most commands never need it

    backbone = _vgg16_state(config.perceptual_backbone)
    with warnings.catch_warnings():  # of torchvision, about how lpips calls it
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # lpips cuts torchvision's `features` into five slices and keeps the layer numbers.
    sources = {name: "features." + name.split(".", 1)[1] for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: backbone[source] for name, source in sources.items()})
    except (KeyError, TypeError, RuntimeError):  # a layer is not there or has another shape
        raise ValueError(
            f"loss.perceptual_backbone={config.perceptual_backbone}: not the weights of "
            "torchvision's VGG-16"
        ) from None
    return network.eval().requires_grad_(False)


def _vgg16_state(path: str | None) -> dict[str, Tensor]:
    """Read torchvision's VGG-16 weights from `path`, or download them once to its cache."""
    from torchvision.models import VGG16_Weights

    remedy = (
        f"download {VGG16_Weights.IMAGENET1K_V1.url} and set loss.perceptual_backbone=FILE, "
        "or set loss.perceptual_weight=0 to train without LPIPS"
    )
    try:
        if path is None:
            return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        return torch.load(path, map_location="cpu", weights_only=True)
    # URLError is an OSError; a wrong hash or half a file is a RuntimeError.
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        source = (
            "cannot be downloaded"
            if path is None
            else f"cannot be read from loss.perceptual_backbone={path}"
        )
        raise ValueError(f"the VGG-16 weights of LPIPS {source} ({reason}): {remedy}") from None
