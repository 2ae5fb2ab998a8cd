"""Everything the next training step depends on, as tensors that can be saved and restored."""

from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from tokenizer.autoencoder import Tokenizer
from tokenizer.config import TrainConfig
from tokenizer.discriminator import (
    BlurDiscriminator,
    LeCam,
    PatchGAN,
    build_discriminator,
)
from tokenizer.run_folder import State


@dataclass
class Adversary:
    """The discriminator's side of the training."""

    discriminator: PatchGAN | BlurDiscriminator
    lecam: LeCam
    optimizer: Adam


@dataclass
class TrainingState:
    """The autoencoder, its EMA copy and, with an adversarial loss, the discriminator."""

    tokenizer: Tokenizer
    ema: ModelEmaV3
    optimizer: Adam
    adversary: Adversary | None

    @classmethod
    def build(cls, config: TrainConfig, device: torch.device) -> "TrainingState":
        """Build everything freshly from the seed of `config` on `device`."""
        torch.manual_seed(config.seed)
        tokenizer = Tokenizer(config.model).to(device)
        adversary = None
        if config.loss.adversarial_weight:
            loss = config.loss
            discriminator = build_discriminator(loss).to(device)
            adversary = Adversary(discriminator, LeCam().to(device), _adam(discriminator, config))
        ema = ModelEmaV3(tokenizer, decay=config.ema_decay, foreach=True)
        return cls(tokenizer, ema, _adam(tokenizer, config), adversary)

    def tensors(self) -> State:
        """Return all tensors by file; `load` is the inverse."""
        state = {
            "model": self.tokenizer.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": _optimizer_tensors(self.optimizer),
        }
        if self.adversary:
            state["discriminator"] = self.adversary.discriminator.state_dict()
            state["lecam"] = self.adversary.lecam.state_dict()
            state["discriminator_optimizer"] = _optimizer_tensors(self.adversary.optimizer)
        return state

    def is_finite(self) -> bool:
        """Return whether all weights are finite numbers."""
        modules = [self.tokenizer, *([self.adversary.discriminator] if self.adversary else [])]
        return all(bool(p.isfinite().all()) for m in modules for p in m.parameters())

    def load(self, state: State) -> None:
        """Restore what `tensors` returned; names and shapes must fit exactly."""
        self.tokenizer.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        _load_optimizer(self.optimizer, state["optimizer"])
        if self.adversary:
            self.adversary.discriminator.load_state_dict(state["discriminator"])
            self.adversary.lecam.load_state_dict(state["lecam"])
            _load_optimizer(self.adversary.optimizer, state["discriminator_optimizer"])


def _adam(module: nn.Module, config: TrainConfig) -> Adam:
    device = next(module.parameters()).device.type
    beta1, beta2 = config.optim.betas
    fused = device in ("cpu", "cuda")
    return Adam(module.parameters(), lr=config.optim.lr, betas=(beta1, beta2), fused=fused)


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Flatten the per-parameter state; learning rates and the like come from the configuration."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
