"""Stopping on SIGTERM or SIGUSR1, which batch systems send: finish the step, save, exit.

And stopping at once where the launcher was killed, which leaves its processes behind.
"""

import os
import signal
from types import FrameType

import torch
from accelerate import Accelerator

# Processes agree on stopping every so many steps, as agreeing waits for the device.
AGREE_EVERY_STEPS = 10


_PARENT = os.getppid()


def check_launcher() -> None:
    """Exit if torchrun or `accelerate launch` is gone: when it is started again, its new processes
    write the same files."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT:
        raise SystemExit("error: the launcher of this process was killed")


class StopRequest:
    """Remembers a signal, and lets all processes act on it at the same step."""

    def __init__(self) -> None:
        self._received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self, accelerator: Accelerator, step: int) -> bool:
        """Return whether any process was asked to stop; all must call this at every step."""
        check_launcher()
        if accelerator.num_processes == 1:
            return self._received
        if step % AGREE_EVERY_STEPS:
            return False
        flag = torch.tensor(float(self._received), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())
