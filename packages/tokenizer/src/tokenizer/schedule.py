"""Learning rate as a function of the step, by timm's schedulers (which keep no state)."""

from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from tokenizer.config import OptimConfig


def lr_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> Scheduler:
    """Return a scheduler; `scheduler.step_update(step)` sets the learning rate of the optimizer
    step number `step`.

    The warm-up is linear from 0 and counts towards `total_steps`; the cosine ends at `min_lr`.
    """
    common = {"warmup_t": config.warmup_steps, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if config.schedule == "cosine":
        return CosineLRScheduler(
            optimizer,
            t_initial=max(1, total_steps - config.warmup_steps),
            lr_min=config.min_lr,
            warmup_prefix=True,
            **common,
        )
    # timm drops one step early (it looks at t + 1); ours is the first step with the lower rate.
    drops = [step + 1 for step in config.decay_steps]
    return MultiStepLRScheduler(
        optimizer, decay_t=drops, decay_rate=config.decay_factor, warmup_prefix=False, **common
    )
