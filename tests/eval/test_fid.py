"""eval.fid from samples and a reference, or its statistics, to results."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import eval.fid
from eval.config import FID_METRICS, FidConfig
from eval.features.inception import InceptionExtractor
from eval.measure import finish, publish
from eval.results import read_results

N = 4


@pytest.fixture
def sets(tmp_path, pictures, degraded):
    """A reference folder of PNG and an .npz of samples; returns (config fields, the two arrays)."""
    images = pictures(N)
    samples = degraded(pictures(N + 2, seed=7), 25)
    (tmp_path / "ref").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "ref" / f"{i}.png")
    np.savez(tmp_path / "samples.npz", samples)
    fields = {"samples": str(tmp_path / "samples.npz"), "ref": str(tmp_path / "ref")}
    return fields | {"out": str(tmp_path / "run"), "splits": 2, "batch_size": 4}, images, samples


def measure(fields, **more):
    records = eval.fid.measure(FidConfig(**(fields | more)), Accelerator(cpu=True))
    return {record.metric: record for record in records}


def test_fid_and_sfid_equal_the_definition_on_the_networks_features(sets, inception_file):
    fields, images, samples = sets
    extractor = InceptionExtractor(str(inception_file), Accelerator(cpu=True))
    features = [
        extractor(torch.from_numpy(a).permute(0, 3, 1, 2).contiguous()) for a in (images, samples)
    ]
    records = measure(fields, weights=str(inception_file))
    assert list(records) == list(FID_METRICS)
    for metric, name in [("fid", "pool3"), ("sfid", "spatial7")]:
        x, y = (getattr(entry, name).double().numpy() for entry in features)
        xc, yc = x - x.mean(0), y - y.mean(0)
        # The trace of the root of the product, as the nuclear norm of the product of the roots.
        root = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt((N - 1) * (N + 1))
        spread = (xc**2).sum() / (N - 1) + (yc**2).sum() / (N + 1) - 2 * root
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + spread
        assert records[metric].value == pytest.approx(expected, rel=1e-5)
        assert records[metric].protocol["rank"] == N - 1
    assert records["fid"].count == N + 2 and records["fid"].protocol["reference_count"] == N
    assert records["inception_score"].reference is None
    assert records["precision"].protocol["used"] == [N, N + 2]


def test_saved_statistics_of_the_reference_give_the_same_fid(sets, inception_file, tmp_path):
    fields, _, _ = sets
    weights = {"weights": str(inception_file)}
    path = str(tmp_path / "stats" / "ref.safetensors")
    direct = measure(fields, **weights, save_ref=path, metrics=["fid"])
    records = measure(fields | {"ref": path}, **weights)
    assert records["fid"].value == pytest.approx(direct["fid"].value, rel=1e-12)
    assert records["fid"].protocol["reference_made_from"] == fields["ref"]
    missing = {name for name, record in records.items() if record.status == "unavailable"}
    assert missing == {"sfid", "precision", "recall"}
    assert "statistics" in records["recall"].reason


def test_n_takes_the_first_samples_and_refuses_fewer(sets, inception_file, tmp_path):
    fields, _, samples = sets
    np.savez(tmp_path / "first.npz", samples[:5])
    weights = {"weights": str(inception_file), "metrics": ["fid"]}
    some = measure(fields, n=5, **weights)["fid"]
    first = measure(fields | {"samples": str(tmp_path / "first.npz")}, **weights)["fid"]
    assert some.count == 5 and some.value == pytest.approx(first.value, rel=1e-6)
    with pytest.raises(ValueError, match=f"n=50: .* holds only {N + 2}"):
        measure(fields, n=50, **weights)


def test_without_weights_nothing_is_a_number(sets, tmp_path):
    fields, _, _ = sets
    records = measure(fields)
    assert {record.status for record in records.values()} == {"unavailable"}
    assert all("weights=PATH" in record.reason for record in records.values())
    with pytest.raises(ValueError, match="save_ref=.*no weights"):
        measure(fields, save_ref=str(tmp_path / "ref.safetensors"))


def test_a_metric_asked_for_by_name_must_be_there(sets, tmp_path):
    fields, _, _ = sets
    accelerator = Accelerator(cpu=True)
    for metrics, absent in [(None, []), (["fid"], ["fid"])]:
        config = FidConfig(**fields, metrics=metrics)
        records = eval.fid.measure(config, accelerator)
        assert publish("fid", config, records, 1.0, accelerator) == absent
    assert len(read_results(tmp_path / "run")) == len(FID_METRICS)
    finish([], accelerator)
    with pytest.raises(SystemExit, match=r"error: metrics=\['fid'\]"):
        finish(["fid"], accelerator)


def test_pairs_need_to_be_told_which_side_is_meant(sets, write_media, pictures, tmp_path):
    fields, _, _ = sets
    folder = str(write_media(tmp_path / "pairs", pictures(4), pictures(4)))
    with pytest.raises(ValueError, match="samples=.* holds pairs: set samples_field=original or"):
        measure(fields | {"samples": folder})
    with pytest.raises(ValueError, match="ref_field"):
        measure(fields | {"ref": folder})
    records = measure(fields | {"ref": folder}, ref_field="original")
    assert records["fid"].reference == f"{folder}, original"


def test_the_model_that_made_the_samples_is_in_the_record(sets, write_media, pictures, tmp_path):
    fields, _, _ = sets
    folder = write_media(tmp_path / "generated", pictures(4))
    assert measure(fields | {"samples": str(folder)})["fid"].checkpoint["id"].endswith("toy")
    manifest = json.loads((folder / "manifest.json").read_text())
    made = {"id": "outputs/ar/b", "digest": "sha256:" + "1" * 64}
    tokens = {"source": {"name": "ar.sample", "checkpoint": made, "seed": 7}}
    manifest["source"] = {"name": "tokenizer.decode", "view": 0, "tokens": tokens}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    record = measure(fields | {"samples": str(folder)})["fid"]
    assert record.checkpoint == made and record.seed == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 1}, "n=1; it must be at least 2"),
        ({"save_ref": "x.npz"}, "must end in .safetensors"),
        ({"save_ref": "x.safetensors", "ref": "y.safetensors"}, "are statistics already"),
        ({"save_ref": "x.safetensors", "metrics": ["recall"]}, "needs fid among the metrics"),
        ({"metrics": ["psnr"]}, "'psnr' is not one of fid"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"manifold_samples": 3}, "manifold_samples=3"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FidConfig(samples="a", ref="b"), **fields)
