"""Processes and devices: the Accelerator, the wrapped model and what all ranks must agree on.

Accelerate gives launch, device, backend and precision. Model, optimizer and data are not passed
through its `prepare`: a prepared scheduler steps once per process and a prepared loader reads on
rank 0, and the step decides both here anyway. Sharding the model is a matter for `wrap`, the one
place that knows how gradients meet.
"""

import contextlib
import os
import signal
from contextlib import AbstractContextManager
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def start(precision: str | None = None, tracking: str = "none") -> Accelerator:
    """Build the Accelerator and check that it sees the launch as it was meant.

    Args:
        precision: no or bf16; None takes what `accelerate launch` was told.
        tracking: none, or the name of a tracker.

    Raises:
        ValueError: for fp16, and when the launcher started more processes than Accelerate sees.
    """
    chosen = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if chosen not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={chosen}: launch with --mixed_precision bf16 or no")
    accelerator = Accelerator(
        # Without this, processes that torchrun starts on a machine without accelerator run alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=chosen,
        log_with=None if tracking == "none" else tracking,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE={launched}: Accelerate sees {accelerator.num_processes} process(es) on "
            f"{accelerator.device}; launch with torchrun or accelerate launch --multi_gpu"
        )
    if accelerator.device.type != "cpu":
        torch.set_float32_matmul_precision("high")  # as the original; it changes fp32 runs only
    return accelerator


def local_processes(accelerator: Accelerator) -> int:
    """Return how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def wrap(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return a module whose backward pass averages gradients over all processes."""
    if accelerator.num_processes == 1:
        return model
    device_ids = None if accelerator.device.type == "cpu" else [accelerator.device.index]
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # the rotary table is a constant
    )


def gradient_sync(model: nn.Module, sync: bool) -> AbstractContextManager[None]:
    """Return the context of one forward and backward pass; the last of a step synchronises."""
    if sync or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def any_rank(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether `flag` is set on any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def mean_over_ranks(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the mean of a tensor over all processes."""
    return accelerator.reduce(values.detach().clone(), "mean")


class StopRequest:
    """Remembers, while entered, SIGTERM and SIGUSR1: what batch systems send before a kill."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
