"""Moments against NumPy, merging, and the statistics artifact."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eval.statistics import Moments, PixelDigest, Provenance, load_statistics, save_statistics

PROTOCOL = {"extractor": "inception", "weights": "sha256:1", "preprocessing": "tf1"}


def features(n, dim=16, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + offset


def accumulated(data, batch):
    moments = Moments(data.shape[1])
    for part in data.split(batch):
        moments.update(part)
    return moments


@pytest.mark.parametrize("batch", [1, 7, 250, 5000])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_equal_numpy_for_every_batch_size(batch, offset):
    data = features(3001, offset=offset)
    moments = accumulated(data, batch)
    assert moments.count == 3001
    np.testing.assert_allclose(moments.mean, data.numpy().mean(0), rtol=1e-12)
    expected = np.cov(data.numpy() - offset, rowvar=False)
    np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-11, atol=1e-10)


def test_merging_in_any_order_equals_seeing_everything():
    data = features(2500)
    parts = [data[:1], data[1:1400], data[1400:1400], data[1400:]]
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        merged = Moments(16)
        for i in order:
            merged.merge(accumulated(parts[i], 100))
        whole = accumulated(data, 300)
        assert merged.count == whole.count
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_a_covariance_of_less_than_two_samples_is_refused(n):
    with pytest.raises(ValueError, match=f"at least 2 samples, there are {n}"):
        accumulated(features(n), 10).covariance()


def test_statistics_round_trip_with_their_provenance(tmp_path):
    path = tmp_path / "sub" / "ref.safetensors"
    moments = accumulated(features(50), 20)
    provenance = Provenance(**PROTOCOL, source="toy val", content="sha256:2")
    save_statistics(path, moments, provenance)
    loaded, read = load_statistics(path, PROTOCOL)
    assert loaded.count == 50 and read == provenance
    assert torch.equal(loaded.mean, moments.mean) and torch.equal(loaded.m2, moments.m2)
    assert [file.name for file in path.parent.iterdir()] == ["ref.safetensors"]


@pytest.mark.parametrize("name", list(PROTOCOL))
def test_statistics_of_another_protocol_are_refused_by_name(tmp_path, name):
    path = tmp_path / "ref.safetensors"
    save_statistics(
        path, accumulated(features(5), 5), Provenance(**PROTOCOL, source="", content="")
    )
    with pytest.raises(ValueError, match=f"made with {name} .* this run uses 'other'"):
        load_statistics(path, PROTOCOL | {name: "other"})


def test_files_that_are_no_statistics_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no such statistics file"):
        load_statistics(path, PROTOCOL)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_statistics(path, PROTOCOL)
    save_file({"mean": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected omv2-statistics version 1"):
        load_statistics(path, PROTOCOL)


def test_the_pixel_digest_depends_on_pixels_and_shape_but_not_on_order():
    images = torch.randint(0, 256, (6, 3, 8, 4), dtype=torch.uint8)

    def digest(*batches):
        whole = PixelDigest()
        for batch in batches:
            part = PixelDigest()
            part.update(batch)
            whole.merge(part)
        return str(whole)

    assert digest(images) == digest(images[4:], images[:4].flip(0))
    changed = images.clone()
    changed[0, 0, 0, 0] ^= 1
    assert digest(changed) != digest(images) != digest(images[:5])
    assert digest(images.reshape(6, 3, 4, 8)) != digest(images)
