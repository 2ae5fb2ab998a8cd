"""The order of training samples against a plain-integer statement of it, and frozen values."""

from itertools import islice

import numpy as np
import pytest

from tokenizer.data.order import epoch_order, micro_batches, mix, step_samples, steps_per_epoch

MASK = 2**64 - 1


def splitmix(*words: int) -> int:
    state = 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def test_the_hash_is_splitmix64():
    # First output of the reference implementation for the seed 0.
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF
    samples = np.arange(50)
    expected = [splitmix(1, 7, 3, int(i)) for i in samples]
    assert mix(1, 7, 3, samples).tolist() == expected


def test_an_epoch_is_sorted_by_the_hash_of_the_samples():
    expected = sorted(range(100), key=lambda i: splitmix(1, 5, 2, i))
    assert epoch_order(100, 5, 2).tolist() == expected


def test_the_order_has_its_frozen_values():
    assert epoch_order(10, 0, 0).tolist() == [3, 1, 9, 6, 2, 4, 7, 8, 0, 5]
    assert epoch_order(10, 0, 1).tolist() == [5, 9, 1, 7, 0, 4, 3, 6, 2, 8]
    batch = step_samples(10, 4, seed=0, step=3)
    assert (batch.epoch, batch.samples.tolist()) == (1, [0, 4, 3, 6])
    assert batch.seeds.tolist() == [splitmix(2, 0, 1, i) for i in (0, 4, 3, 6)]


def test_every_sample_comes_at_most_once_per_epoch_and_the_rest_is_dropped():
    assert steps_per_epoch(103, 10) == 10
    seen = [i for step in range(10) for i in step_samples(103, 10, seed=1, step=step).samples]
    assert len(set(seen)) == 100
    assert step_samples(103, 10, seed=1, step=10).epoch == 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_and_micro_steps_together_make_the_same_global_batch(world, accumulation):
    micro_batch = 24 // (world * accumulation)
    streams = [
        micro_batches(
            100,
            seed=9,
            start_step=3,
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]
    for step in range(3, 7):
        parts = [part for stream in streams for part in islice(stream, accumulation)]
        expected = step_samples(100, 24, seed=9, step=step)
        pairs = zip(expected.samples.tolist(), expected.seeds.tolist(), strict=True)
        assert sorted(pair for part in parts for pair in part) == sorted(pairs)


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(ValueError, match="global batch 11 does not fit a data set of 10"):
        step_samples(10, 11, seed=0, step=0)
