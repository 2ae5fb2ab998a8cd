"""The optimizer of the paper and its learning rate, a pure function of the step."""

import torch
from torch import Tensor, nn

from ar.config import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of a step, counted from 0.

    Linear warm-up from 0.5 % of the peak; then, with p the progress after it, the peak while p < 5
    %, then linear down to 10 % of the peak at p = 1.
    """
    warmup_steps = round(optim.warmup_fraction * total_steps)
    if step < warmup_steps:
        return optim.lr * (0.005 + 0.995 * step / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return optim.lr * (1.0 if progress < 0.05 else 0.1 + 0.9 * (1 - progress) / 0.95)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, object]]:
    """Split the parameters into matrices, which decay, and norm gains, which may."""
    decayed: list[Tensor] = [p for p in model.parameters() if p.ndim >= 2 or optim.decay_all]
    plain: list[Tensor] = [p for p in model.parameters() if p.ndim < 2 and not optim.decay_all]
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": optim.weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    return groups


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW, fused where the device has the fused kernel."""
    beta1, beta2 = optim.betas

    def build(fused: bool) -> torch.optim.AdamW:
        groups = parameter_groups(model, optim)
        return torch.optim.AdamW(
            groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps, fused=fused
        )

    try:
        return build(fused=True)
    except RuntimeError:  # raised by the constructor for a device without it
        return build(fused=False)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Flatten the optimizer's state to `PARAMETER.ENTRY`; `load_optimizer` is the inverse."""
    return {
        f"{name}.{entry}": tensor
        for name, parameter in model.named_parameters()
        for entry, tensor in optimizer.state[parameter].items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned; learning rates come from the schedule."""
    positions = {
        id(parameter): number
        for number, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
    number_of = {name: positions[id(p)] for name, p in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(".")
        state.setdefault(number_of[name], {})[entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
