"""The batches of one process, read ahead of the training by a thread."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ar.order import Order, rank_rows
from ar.shards import IndexShards

_READ_AHEAD = 2  # steps


@dataclass(frozen=True)
class Batch:
    """What one process computes in one step: A forward passes of M images."""

    tokens: Tensor  # int64 [A, M, L]
    labels: Tensor  # int64 [A, M], -1 where dropped


def batch_reader(
    shards: IndexShards, order: Order, micro_batch: int, rank: int, world_size: int, pin: bool
) -> Callable[[int], Batch]:
    """Return the function that reads this process's part of a step."""
    rows = rank_rows(order.global_batch, micro_batch, rank, world_size)  # [A, M]

    def read(step: int) -> Batch:
        samples, views, dropped = (part[rows.ravel()] for part in order.batch(step))
        tokens, labels = shards.read(samples, views)
        labels = np.where(dropped, -1, labels)
        parts = [torch.from_numpy(part).unflatten(0, rows.shape) for part in (tokens, labels)]
        return Batch(*(part.pin_memory() if pin else part for part in parts))

    return read


def read_ahead(read: Callable[[int], Batch], first: int, last: int) -> Generator[Batch]:
    """Yield the batches of steps `first` to `last` - 1, the next ones being read meanwhile."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        pending: deque[Future[Batch]] = deque()
        for step in range(first, last):
            pending.append(pool.submit(read, step))
            if len(pending) > _READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
