"""The Inception network and the inception score against torch-fidelity with the same weights."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x,
)
from torch_fidelity.metric_isc import isc_features_to_metric

from eval.features.inception import InceptionExtractor
from eval.features.resize import tf1_bilinear
from eval.inception_score import InceptionScore


@pytest.mark.parametrize("size", [(32, 32), (128, 130), (299, 299), (400, 512)])
def test_tf1_resize_equals_torch_fidelity(size):
    images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0))
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(tf1_bilinear(images.float(), 299), expected, rtol=0, atol=1e-4)


def test_all_taps_equal_torch_fidelity(inception_file, pictures):
    reference = FeatureExtractorInceptionV3(
        "inception",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(inception_file),
    )
    seen = {}
    reference.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.update(out=args[2]))
    images = torch.from_numpy(pictures(3, 48)).permute(0, 3, 1, 2).contiguous()
    pool3, logits = reference(images)
    features = InceptionExtractor(str(inception_file), Accelerator(cpu=True))(images)
    spatial7 = seen["out"][:, :7].permute(0, 2, 3, 1).flatten(1)  # H, W, C
    for found, expected in [
        (features.pool3, pool3),
        (features.logits, logits),
        (features.spatial7, spatial7),
    ]:
        assert found.shape == expected.shape and expected.std() > 1e-3
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_custom_weights_are_named_in_the_protocol(inception_file):
    protocol = InceptionExtractor(str(inception_file), Accelerator(cpu=True)).protocol
    assert protocol["name"] == "ours (custom weights)"
    assert protocol["extractor"] == "inception-2015-12-05 (custom weights)"
    assert protocol["weights"].startswith("sha256:")


def logits(n, seed=0):
    return 3 * torch.randn(n, 1008, generator=torch.Generator().manual_seed(seed))


def score_of(values, splits, batch=7):
    score = InceptionScore(splits)
    for start in range(0, len(values), batch):
        score.update(values[start : start + batch], start)
    return score


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_equals_torch_fidelity(splits):
    values = logits(60)
    # Consecutive splits of the peer are the interleaved ones of ours after this reordering.
    order = torch.arange(60).view(-1, splits).T.flatten()
    expected = isc_features_to_metric(values[order], splits=splits, shuffle=False)
    found = score_of(values, splits).compute()
    assert found == pytest.approx(expected["inception_score_mean"], rel=1e-10)


def test_inception_score_equals_the_definition():
    values = logits(30, seed=3).double().numpy()
    p = np.exp(values - values.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = []
    for part in (p[0::3], p[1::3], p[2::3]):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert score_of(torch.from_numpy(values), 3).compute() == pytest.approx(np.mean(scores))


def test_inception_score_merges_and_ignores_batch_sizes():
    values = logits(40)
    whole = score_of(values, 5, 40)
    merged = InceptionScore(5)
    for start, stop in [(23, 40), (0, 23)]:
        part = InceptionScore(5)
        part.update(values[start:stop], start)
        merged.merge(part)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert merged.count.tolist() == [8] * 5


def test_a_class_sorted_file_scores_like_a_shuffled_one():
    sharp = torch.full((40, 1008), -20.0)
    sharp[torch.arange(40), torch.arange(40) // 10] = 20.0  # four classes, sorted
    assert score_of(sharp, 10).compute() == pytest.approx(4, rel=1e-6)


def test_fewer_pictures_than_splits_are_refused():
    with pytest.raises(ValueError, match="3 pictures cannot fill splits=10"):
        score_of(logits(3), 10).compute()
