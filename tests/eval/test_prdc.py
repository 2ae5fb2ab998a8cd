"""Precision and recall against brute force and torch-fidelity."""

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

import eval.prdc
from eval.prdc import FeatureSubset, precision_recall


def clouds(n, m, dim=8, offset=0.0):
    generator = torch.Generator().manual_seed(n + m)
    real = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return real + offset, 0.8 * torch.randn(m, dim, generator=generator).double() + offset + 0.3


def brute_force(real, generated, k):
    def share(queries, centres):
        inside = 0
        for query in queries:
            for centre in centres:
                radius = sorted(float((centre - other).norm()) for other in centres)[k]
                if float((query - centre).norm()) <= radius:
                    inside += 1
                    break
        return inside / len(queries)

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(k):
    real, generated = clouds(25, 31)
    found = precision_recall(real, generated, k)
    assert found == brute_force(real, generated, k)
    assert 0 < found[0] < 1 and 0 < found[1] < 1


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_change_nothing(monkeypatch, chunk):
    real, generated = clouds(150, 170)
    expected = precision_recall(real, generated)
    monkeypatch.setattr(eval.prdc, "CHUNK", chunk)
    assert precision_recall(real, generated) == expected


def test_float32_far_from_the_origin_equals_torch_fidelity_in_float64():
    real, generated = clouds(300, 280, dim=24)
    expected = prc_features_to_metric(  # its convention is (generated, real)
        generated, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    found = precision_recall((real + 100).float(), (generated + 100).float())
    assert 0.2 < found[1] < 0.9
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_identical_sets_are_fully_precise_and_recalled():
    real, _ = clouds(60, 1)
    assert precision_recall(real.float(), real.float().clone()) == (1.0, 1.0)


def test_too_few_points_are_refused():
    real, generated = clouds(10, 3)
    with pytest.raises(ValueError, match="3 generated pictures have no neighbours=3"):
        precision_recall(real, generated, 3)


@pytest.mark.parametrize(("total", "limit"), [(10, 3), (10, 10), (10, 99), (997, 100)])
def test_a_subset_is_spread_evenly_and_independent_of_batches_and_ranks(total, limit):
    data = torch.arange(total).float()[:, None]
    merged = FeatureSubset(total, limit)
    for start in reversed(range(0, total, 4)):
        part = FeatureSubset(total, limit)
        part.update(data[start : start + 4], start)
        merged.merge(part)
    taken = merged.features().flatten()
    assert len(taken) == min(limit, total) and torch.equal(taken, taken.sort().values)
    gaps = taken.diff()
    assert gaps.max() - gaps.min() <= 1
    alone = FeatureSubset(total, limit)
    alone.update(data, 0)
    assert torch.equal(alone.features().flatten(), taken)
