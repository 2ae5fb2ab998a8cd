"""Which samples a training step sees: a pure function of (seed, step), however many processes.

Nothing here keeps state, so resuming at a step needs nothing but its number. All randomness is a
counter-based hash (the finalizer of SplitMix64, Steele et al. 2014) in integer arithmetic: the
order is the same on every machine and with every version of NumPy and PyTorch.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What a hash is drawn for, so that the order of an epoch says nothing about the crops in it.
_ORDER, _AUGMENT = 1, 2


def mix(*words: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers, broadcast against one another, to uint64 (of at least one dimension)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = state ^ np.atleast_1d(np.asarray(word).astype(np.uint64))
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


@functools.lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the permutation of range(num_samples) that `epoch` follows (read-only)."""
    order = np.argsort(mix(_ORDER, seed, epoch, np.arange(num_samples)), kind="stable")
    order.flags.writeable = False
    return order.astype(np.int64, copy=False)


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Return the number of full global batches in an epoch; the rest of the epoch is dropped."""
    if not 1 <= global_batch <= num_samples:
        raise ValueError(
            f"global batch {global_batch} does not fit a data set of {num_samples} samples: "
            f"use a batch of 1 to {num_samples}"
        )
    return num_samples // global_batch


@dataclass(frozen=True)
class StepSamples:
    """The samples of one optimizer step, in the order of the global batch."""

    epoch: int
    samples: NDArray[np.int64]  # [global_batch] positions in the data set
    seeds: NDArray[
        np.uint64
    ]  # [global_batch] augmentation seed of each, from (seed, epoch, sample)


def step_samples(num_samples: int, global_batch: int, *, seed: int, step: int) -> StepSamples:
    """Return the global batch of `step` (counted from 0)."""
    epoch, batch = divmod(step, steps_per_epoch(num_samples, global_batch))
    order = epoch_order(num_samples, seed, epoch)
    samples = order[batch * global_batch : (batch + 1) * global_batch]
    return StepSamples(epoch, samples, mix(_AUGMENT, seed, epoch, samples))


def micro_batches(
    num_samples: int,
    *,
    seed: int,
    start_step: int,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yield this rank's lists of (sample, augmentation seed) without end, `accumulation` per step.

    The global batch has micro_batch * accumulation * world samples and is cut into consecutive
    micro-batches, dealt to the ranks in turn: the union over ranks and micro-steps is the same
    global batch however it is cut.
    """
    global_batch = micro_batch * accumulation * world
    step = start_step
    while True:
        batch = step_samples(num_samples, global_batch, seed=seed, step=step)
        for micro_step in range(accumulation):
            start = (micro_step * world + rank) * micro_batch
            part = slice(start, start + micro_batch)
            yield list(zip(batch.samples[part].tolist(), batch.seeds[part].tolist(), strict=True))
        step += 1
