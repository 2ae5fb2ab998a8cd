"""Class accuracy: the classifier on real digits, classes matched by name, clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from eval.accuracy import class_accuracies, features, measure
from eval.config import AccuracyConfig
from eval.results import Record, read_results, write_results


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the handwritten digits of scikit-learn at 32x32 as ADM files: train and holdout."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] * (255 / 16)
    x = F.interpolate(x, size=32, mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    images = x.permute(0, 2, 3, 1).numpy()
    order = np.random.default_rng(0).permutation(len(images))
    for name, part in (("train", order[:1437]), ("holdout", order[1437:])):
        np.savez(folder / f"{name}.npz", arr_0=images[part], arr_1=data.target[part])
    return folder


def config_of(folder: Path, samples: str = "holdout.npz", **options: object) -> AccuracyConfig:
    return AccuracyConfig(
        samples=str(folder / samples),
        train=str(folder / "train.npz"),
        holdout=str(folder / "holdout.npz"),
        **options,
    )


def by_metric(records: list[Record]) -> dict[str, Record]:
    return {record.metric: record for record in records}


def test_real_digits_are_recognised(digits: Path) -> None:
    records = by_metric(measure(config_of(digits)))
    holdout = records["classifier_holdout_accuracy"]
    assert holdout.value is not None and holdout.value >= 0.98
    assert records["class_accuracy"].value == holdout.value  # the same pictures
    assert holdout.count == 360
    assert holdout.protocol is not None and holdout.protocol["train_count"] == 1437


def test_labels_that_are_wrong_by_one_are_never_right(digits: Path, tmp_path: Path) -> None:
    with np.load(digits / "holdout.npz") as data:
        np.savez(tmp_path / "wrong.npz", arr_0=data["arr_0"], arr_1=(data["arr_1"] + 1) % 10)
    record = measure(config_of(digits, str(tmp_path / "wrong.npz")))[0]
    assert record.metric == "class_accuracy"
    assert record.value is not None and record.value < 0.02


def test_the_same_command_gives_the_same_records(digits: Path) -> None:
    assert measure(config_of(digits, max_train=300)) == measure(config_of(digits, max_train=300))


def test_fewer_training_pictures_are_spread_over_the_set(digits: Path) -> None:
    record = measure(config_of(digits, max_train=300))[1]
    assert record.protocol is not None and record.protocol["train_count"] == 300
    assert len(record.protocol["per_class"]) == 10
    assert record.value is not None and 0.9 < record.value < 0.99


def test_accuracy_of_each_class_is_counted_over_that_class() -> None:
    asked, predicted = np.array([0, 0, 0, 2, 2]), np.array([0, 1, 0, 2, 0])
    found = class_accuracies(predicted, asked, ["cat", "dog", "owl"])
    assert found == {"cat": pytest.approx(2 / 3), "owl": 0.5}
    assert class_accuracies(predicted, asked, None) == {"0": pytest.approx(2 / 3), "2": 0.5}


def test_features_keep_channels_and_halves_of_a_picture_apart() -> None:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[:, 1, :, 16:] = 255
    rows = features(images, 16).reshape(3, 16, 16)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[0], -0.5)
    np.testing.assert_allclose(rows[1, :, :7], -0.5, atol=1e-6)
    np.testing.assert_allclose(rows[1, :, 9:], 0.5, atol=1e-6)


def write_folder(root: Path, colors: dict[str, int], count: int = 6) -> str:
    """Write `count` flat grey pictures of each class into a folder of its name."""
    for name, level in colors.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (level + i,) * 3).save(root / name / f"{i}.png")
    return str(root)


def test_classes_are_matched_by_name_not_by_number(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "train", {"black": 10, "grey": 120, "white": 240})
    samples = write_folder(tmp_path / "samples", {"white": 238, "grey": 121})  # grey is class 0
    records = measure(AccuracyConfig(samples=samples, train=train, holdout=train, side=4))
    assert [record.value for record in records] == [1.0, 1.0]
    assert records[0].protocol is not None
    assert records[0].protocol["per_class"] == {"grey": 1.0, "white": 1.0}


def test_unusable_sets_are_refused_by_name(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "train", {"black": 10, "white": 240})
    other = write_folder(tmp_path / "other", {"black": 10, "violet": 240})
    flat = write_folder(tmp_path / "flat", {".": 10})
    single = write_folder(tmp_path / "single", {"black": 10})
    with pytest.raises(ValueError, match="samples=.*class 'violet' is not among the classes of tr"):
        measure(AccuracyConfig(samples=other, train=train, holdout=train))
    with pytest.raises(ValueError, match=r"samples=.*flat: 0\.png has no class"):
        measure(AccuracyConfig(samples=flat, train=train, holdout=train))
    with pytest.raises(ValueError, match="train=.*single: holds one class"):
        measure(AccuracyConfig(samples=single, train=single, holdout=single))
    with pytest.raises(ValueError, match="side=2; it must be from 4 to 64"):
        AccuracyConfig(samples="a", train="b", holdout="c", side=2)


def test_the_record_names_the_model_that_made_the_samples(digits, tmp_path, write_media) -> None:
    with np.load(digits / "holdout.npz") as data:
        folder = write_media(tmp_path / "samples", data["arr_0"][:8], cls=[0] * 8)
    manifest = json.loads((folder / "manifest.json").read_text())
    made = {"id": "outputs/ar/tiny", "digest": "sha256:" + "1" * 64}
    tokens = {"source": {"name": "ar.sample", "checkpoint": made, "seed": 3}}
    manifest |= {"source": {"name": "tokenizer.decode", "tokens": tokens}, "class_names": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    samples, holdout = measure(config_of(digits, str(folder), max_train=300))
    assert (samples.checkpoint, samples.seed) == (made, 3)
    assert (holdout.checkpoint, holdout.seed) == (None, None)


def test_records_reach_the_run_folder_with_each_class(digits: Path, tmp_path: Path) -> None:
    records = measure(config_of(digits, max_train=300))
    path = write_results(tmp_path / "run", "accuracy", records, 1.0)
    found = read_results(tmp_path / "run")
    assert [r["metric"] for r in found] == ["class_accuracy", "classifier_holdout_accuracy"]
    assert set(found[0]["protocol"]["per_class"]) == {str(i) for i in range(10)}
    assert json.loads(path.read_text())["format"] == "omv2-results"
