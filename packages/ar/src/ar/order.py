"""Which samples a step sees: a pure function of (seed, step), with no state to save.

Each epoch is a permutation of all samples, cut into global batches (the incomplete last one is
dropped). The global batch of a step is the same for every number of processes and every
accumulation count; those only decide who computes which part of it. All choices come from a 64-bit
hash in integer arithmetic, so they depend on no library's generator.
"""

import functools
from dataclasses import dataclass

import numpy as np

# Streams of the hash: what a number is drawn for.
_PERMUTATION, _VIEW, _CLASS_DROPOUT, _STEP_SEED = range(4)


def hash64(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys (scalars or arrays that broadcast) to uint64, by chained splitmix64."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # wrapping at 2^64 is the arithmetic meant
        for key in keys:
            state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the dropout masks of one step on one process, below 2^63."""
    return int(hash64(_STEP_SEED, seed, step, rank)) >> 1


@functools.lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return a permutation of `num_samples` samples, int64."""
    keys = hash64(_PERMUTATION, seed, epoch, np.arange(num_samples))
    return np.argsort(keys, kind="stable")  # stable: equal keys, should they occur, have one order


@dataclass(frozen=True)
class Order:
    """The sequence of samples of a run.

    Raises:
        ValueError: when the data holds fewer samples than one global batch.
    """

    num_samples: int
    num_views: int
    global_batch: int
    seed: int
    class_dropout: float = 0.0  # share of samples whose label is dropped

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise ValueError(
                f"global_batch={self.global_batch}: must be at most {self.num_samples}, the number "
                "of samples in data.shards"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the samples of a step, their views and whether their labels are dropped.

        Int64, int64 and bool, each `[global_batch]`.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        permutation = epoch_permutation(self.seed, epoch, self.num_samples)
        samples = permutation[index * self.global_batch : (index + 1) * self.global_batch]
        views = hash64(_VIEW, self.seed, epoch, samples) % np.uint64(self.num_views)
        # The top 53 bits make a float in [0, 1).
        uniform = (hash64(_CLASS_DROPOUT, self.seed, epoch, samples) >> np.uint64(11)) * 2.0**-53
        return samples, views.astype(np.int64), uniform < self.class_dropout


def accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Return the number of forward passes per step and process.

    Raises:
        ValueError: when `micro_batch` x `world_size` does not divide `global_batch`.
    """
    count, rest = divmod(global_batch, micro_batch * world_size)
    if rest or count == 0:
        share, uneven = divmod(global_batch, world_size)
        if uneven or share == 0:
            hint = (
                f"choose a global_batch that is a multiple of {world_size}, the number of processes"
            )
        else:
            fits = max(m for m in range(1, min(micro_batch, share) + 1) if share % m == 0)
            hint = f"micro_batch={fits} fits"
        raise ValueError(
            f"micro_batch={micro_batch}: micro_batch x {world_size} processes must divide "
            f"global_batch={global_batch}; {hint}"
        )
    return count


def rank_rows(global_batch: int, micro_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Return the rows of the global batch of one process, int64 `[accumulation, micro_batch]`."""
    count = accumulation(global_batch, micro_batch, world_size)
    return np.arange(global_batch).reshape(count, world_size, micro_batch)[:, rank]
