"""Numbers for the training log: parts of the loss, throughput and time spent waiting for data."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

T = TypeVar("T")


class Clock:
    """Measures the time between two log lines and how much of it passed waiting for data."""

    def __init__(self, step: int) -> None:
        self._start = time.perf_counter()
        self._step = step
        self._waited_s = 0.0

    def wait(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, counting the time each one takes to arrive."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self._waited_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def rates(self, step: int, images_per_step: int) -> dict[str, float]:
        """Return images per second and the share of time waited since the last call."""
        now = time.perf_counter()
        elapsed = now - self._start
        rates = {
            "images_per_s": (step - self._step) * images_per_step / elapsed,
            "data_wait": self._waited_s / elapsed,
        }
        self._start, self._step, self._waited_s = now, step, 0.0
        return rates


def add_parts(totals: dict[str, Tensor], parts: dict[str, Tensor], count: int) -> None:
    """Add `parts / count` to `totals`, on the device."""
    for name, part in parts.items():
        totals[name] = totals.get(name, 0) + part.float() / count


def sum_over_processes(count: int, accelerator: Accelerator) -> int:
    """Return the sum of a count of each process."""
    return int(accelerator.reduce(torch.tensor(count, device=accelerator.device), "sum").item())


def mean_over_processes(parts: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Return the parts averaged over the processes, as numbers."""
    values = accelerator.reduce(torch.stack(list(parts.values())), "mean")
    return dict(zip(parts, values.tolist(), strict=True))
