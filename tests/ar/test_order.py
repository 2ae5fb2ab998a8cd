"""The order of samples: frozen, complete, and the same for every number of processes."""

import numpy as np
import pytest

from ar.order import Order, accumulation, epoch_permutation, hash64, rank_rows, step_seed

MASK = 2**64 - 1


def splitmix(state: int) -> int:
    """The published finaliser, in Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF  # first output of the published generator, seed 0
    assert int(hash64(0)) == splitmix(0)
    for keys in [(3,), (1, 2), (7, 0, 2**40)]:
        state = 0
        for key in keys:
            state = splitmix((state + key) & MASK)
        assert int(hash64(*keys)) == state


def test_the_order_is_frozen() -> None:
    assert epoch_permutation(0, 0, 8).tolist() == [0, 7, 4, 2, 1, 6, 5, 3]
    assert epoch_permutation(0, 1, 8).tolist() == [6, 0, 7, 3, 4, 2, 1, 5]
    order = Order(num_samples=10, num_views=4, global_batch=4, seed=1, class_dropout=0.5)
    samples, views, dropped = order.batch(3)
    assert samples.tolist() == [1, 5, 8, 7]
    assert views.tolist() == [0, 3, 2, 1]
    assert dropped.tolist() == [False, True, True, False]
    assert step_seed(0, 5, 1) == 1981197043434597835


def test_an_epoch_holds_every_sample_at_most_once_and_drops_the_rest() -> None:
    order = Order(num_samples=103, num_views=1, global_batch=10, seed=0)
    assert order.steps_per_epoch == 10
    for epoch in range(2):
        seen = np.concatenate([order.batch(epoch * 10 + step)[0] for step in range(10)])
        assert len(set(seen.tolist())) == 100
        assert seen.max() < 103
    assert order.batch(0)[0].tolist() != order.batch(10)[0].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_the_parts_of_all_processes_make_the_global_batch(world_size: int) -> None:
    global_batch = 48
    for micro_batch in (1, 2, 48 // world_size):
        rows = [
            rank_rows(global_batch, micro_batch, rank, world_size) for rank in range(world_size)
        ]
        count = accumulation(global_batch, micro_batch, world_size)
        assert all(part.shape == (count, micro_batch) for part in rows)
        assert sorted(np.concatenate(rows, axis=None).tolist()) == list(range(global_batch))


def test_views_and_dropped_labels_are_spread_evenly() -> None:
    order = Order(
        num_samples=100_000, num_views=10, global_batch=100_000, seed=0, class_dropout=0.1
    )
    _, views, dropped = order.batch(0)
    counts = np.bincount(views, minlength=10)
    assert counts.min() > 9600 and counts.max() < 10400  # +- 4 standard deviations
    assert 9600 < dropped.sum() < 10400
    again = order.batch(1)
    assert (views[np.argsort(order.batch(0)[0])] != again[1][np.argsort(again[0])]).mean() > 0.8


def test_batches_that_do_not_fit_are_refused_with_a_size_that_does() -> None:
    with pytest.raises(ValueError, match=r"micro_batch=24.*global_batch=64; micro_batch=16 fits"):
        accumulation(64, 24, 2)
    with pytest.raises(ValueError, match="multiple of 3"):
        accumulation(64, 8, 3)
    with pytest.raises(ValueError, match="global_batch=64: must be at most 63"):
        Order(num_samples=63, num_views=1, global_batch=64, seed=0)
