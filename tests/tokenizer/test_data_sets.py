"""The four data sets: layouts, splits, labels, what they leave out and what they refuse."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from tokenizer.config import DataConfig
from tokenizer.data import open_dataset
from tokenizer.data.source import PackedStrings, held_out


def picture(value: int = 0, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, format)
    return buffer.getvalue()


def write(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(value))
    return root


def opened(name: str, root: Path | str | None, split: str = "train", **options):
    config = DataConfig(name=name, root=root and str(root), resolution=8, num_workers=0, **options)
    return open_dataset(config, split, train=False)


def keys(dataset) -> list[str]:
    return [dataset.key(i) for i in range(len(dataset))]


def test_digits_are_the_ones_of_scikit_learn():
    from sklearn.datasets import load_digits

    dataset = open_dataset(DataConfig(), "all", train=False)
    digits = load_digits()
    assert len(dataset) == 1797
    assert dataset.class_names == list("0123456789")
    assert np.array_equal(dataset.labels, digits.target)
    image = dataset.load(11)
    assert image.shape == (3, 32, 32)
    assert (image == image[0]).all()
    # Smooth enlarging keeps the means of the 4 x 4 cells close to the 8 x 8 original.
    cells = image[0].double().unflatten(0, (8, 4)).unflatten(2, (8, 4)).mean((1, 3))
    assert np.abs(cells.numpy() - digits.images[11] * 255 / 16).mean() < 12


def test_digits_are_split_once_and_for_all():
    train, val, everything = (
        open_dataset(DataConfig(), split, train=False) for split in ("train", "val", "all")
    )
    assert (len(train), len(val)) == (1437, 360)
    assert set(keys(train)).isdisjoint(keys(val))
    assert set(keys(train)) | set(keys(val)) == set(keys(everything))
    shares = np.bincount(val.labels) / np.bincount(everything.labels)
    assert np.abs(shares - 0.2).max() < 0.005
    assert keys(val)[:4] == FIRST_VAL_DIGITS


def test_the_held_out_share_is_stratified_and_independent_of_the_order():
    names = [f"a/{i}" for i in range(40)] + [f"b/{i}" for i in range(20)]
    labels = np.array([0] * 40 + [1] * 20)
    marked = held_out(names, labels, 0.25)
    assert [marked[labels == c].sum() for c in (0, 1)] == [10, 5]
    order = np.random.default_rng(0).permutation(60)
    shuffled = held_out([names[i] for i in order], labels[order], 0.25)
    assert np.array_equal(shuffled, marked[order])


def test_packed_strings_are_a_list_of_strings():
    strings = ["", "n01440764/a.JPEG", "Z\u00fcrich", "x"]
    packed = PackedStrings(strings)
    assert list(packed) == strings
    assert packed[-1] == "x" and packed[1:3] == strings[1:3] and len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_imagenet_is_read_by_sorted_synsets(tmp_path, monkeypatch):
    write(tmp_path, "train/n02/b.JPEG", "train/n01/a.JPEG", "val/n02/v.JPEG", "train/n03/c.JPEG")
    write(tmp_path, "train/n03/n06596364_9591.JPEG")
    monkeypatch.setenv("IMAGENET_ROOT", str(tmp_path))
    train = opened("imagenet", None)
    assert keys(train) == ["n01/a.JPEG", "n02/b.JPEG", "n03/c.JPEG"]
    assert train.labels.tolist() == [0, 1, 2]
    assert train.ignored.examples == [
        "n03/n06596364_9591.JPEG: left out as in the published recipe"
    ]
    val = opened("imagenet", None, "val")
    assert val.class_names == ["n01", "n02", "n03"] and val.labels.tolist() == [1]
    assert int(val.load(0)[0, 0, 0]) == 2


def test_imagenet_without_class_folders_is_refused(tmp_path):
    write(tmp_path, "train/n01/a.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="val has no class folders.*n01440764"):
        opened("imagenet", tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "folder", "webdataset"])
def test_a_missing_root_names_what_to_set(name, tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)
    expected = "data.root=FOLDER" + (".*IMAGENET_ROOT" if name == "imagenet" else "")
    with pytest.raises(FileNotFoundError, match=expected):
        opened(name, None)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere: no such folder"):
        opened(name, tmp_path / "nowhere")


def test_class_folders_are_split_by_name(tmp_path):
    write(tmp_path, *(f"{c}/{i:02d}.png" for c in ("cat", "dog") for i in range(20)))
    train, val, everything = (
        opened("folder", tmp_path, split, val_fraction=0.1) for split in ("train", "val", "all")
    )
    assert np.bincount(train.labels).tolist() == [18, 18]
    assert np.bincount(val.labels).tolist() == [2, 2]
    assert sorted(keys(train) + keys(val)) == keys(everything)
    assert everything.class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match="data.split=test: this data set has the splits"):
        opened("folder", tmp_path, "test")


def test_split_folders_are_used_as_they_are(tmp_path):
    write(tmp_path, "train/cat/1.png", "val/dog/2.png", "notes/extra.png")
    assert keys(opened("folder", tmp_path)) == ["cat/1.png"]
    val = opened("folder", tmp_path, "val")
    assert (keys(val), val.labels.tolist()) == (["dog/2.png"], [1])
    assert keys(opened("folder", tmp_path, "all")) == ["train/cat/1.png", "val/dog/2.png"]
    with pytest.raises(FileNotFoundError, match="data.split=test: .* has train, val"):
        opened("folder", tmp_path, "test")


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, "bus/1.png", "train/2.png")
    assert opened("folder", tmp_path, "all").class_names == ["bus", "train"]


def test_a_flat_folder_has_no_classes(tmp_path):
    write(tmp_path, "b.jpg", "a.PNG", "c.webp")
    dataset = opened("folder", tmp_path, "all")
    assert keys(dataset) == ["a.PNG", "b.jpg", "c.webp"]
    assert dataset.class_names is None and dataset.labels.tolist() == [-1, -1, -1]


def test_what_is_no_picture_by_its_name_is_counted(tmp_path):
    write(tmp_path, "cat/1.png", "cat/deep/er/2.jpeg", "cat/notes.txt", "cat/._1.png", "top.png")
    write(tmp_path, ".hidden/3.png")
    dataset = opened("folder", tmp_path, "all")
    assert keys(dataset) == ["cat/1.png", "cat/deep/er/2.jpeg"]
    assert dataset.ignored.to_json() == {
        "count": 3,
        "reasons": {"beside the class folders": 1, "not a picture by its name": 2},
        "examples": [
            "cat/._1.png: not a picture by its name",
            "cat/notes.txt: not a picture by its name",
            "top.png: beside the class folders",
        ],
    }


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="no picture in split all .found 1 not a picture"):
        opened("folder", tmp_path, "all")


def write_tar(path: Path, *samples: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def sample(key: str, value: int, **fields: bytes) -> dict:
    return {"__key__": key, "png": picture(value), **fields}


def test_tars_of_webdataset_are_read_at_random(tmp_path):
    samples = [sample(f"a/{i}", i, cls=str(i % 3).encode()) for i in range(6)]
    write_tar(tmp_path / "000.tar", *samples[:4])
    write_tar(tmp_path / "001.tar", *samples[4:])
    dataset = opened("webdataset", tmp_path, "all")
    assert keys(dataset) == [f"a/{i}" for i in range(6)]
    assert dataset.class_names == ["0", "1", "2"]
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert [int(dataset.load(i)[0, 0, 0]) for i in (5, 0, 4)] == [5, 0, 4]
    pattern = opened("webdataset", f"{tmp_path}/{{000..001}}.tar", "all")
    assert keys(pattern) == keys(dataset)
    train, val = (opened("webdataset", tmp_path, split) for split in ("train", "val"))
    assert sorted(keys(train) + keys(val)) == keys(dataset) and len(val) == 1


def test_tars_are_divided_by_folder_or_by_name(tmp_path):
    write_tar(tmp_path / "names/imagenet-train-000.tar", sample("t", 0))
    write_tar(tmp_path / "names/imagenet-val-000.tar", sample("v", 0))
    write_tar(tmp_path / "folders/train/000.tar", sample("t", 0))
    write_tar(tmp_path / "folders/val/000.tar", sample("v", 0))
    for layout in ("names", "folders"):
        assert keys(opened("webdataset", tmp_path / layout, "train")) == ["t"]
        assert keys(opened("webdataset", tmp_path / layout, "val")) == ["v"]
        assert keys(opened("webdataset", tmp_path / layout, "all")) == ["t", "v"]
    with pytest.raises(FileNotFoundError, match="data.split=test.*only train, val"):
        opened("webdataset", tmp_path / "names", "test")


def test_labels_come_from_json_where_there_is_no_cls(tmp_path):
    names = ["dog", "cat", "dog"]
    samples = [
        sample(str(i), i, json=json.dumps({"kind": name}).encode()) for i, name in enumerate(names)
    ]
    write_tar(tmp_path / "000.tar", *samples)
    dataset = opened("webdataset", tmp_path, "all", label_key="kind")
    assert dataset.class_names == ["cat", "dog"] and dataset.labels.tolist() == [1, 0, 1]
    assert opened("webdataset", tmp_path, "all").class_names is None


def test_samples_of_tars_that_cannot_be_used_are_counted(tmp_path):
    write_tar(
        tmp_path / "000.tar",
        sample("a", 0, cls=b"0"),
        {"__key__": "b", "txt": b"no picture"},
        sample("c", 0),
    )
    dataset = opened("webdataset", tmp_path, "all")
    assert keys(dataset) == ["a"]
    assert dataset.ignored.reasons == {"no picture in the sample": 1, "no class label": 1}


def test_keys_that_tars_repeat_get_the_name_of_the_tar(tmp_path):
    for name in ("x", "y"):
        write_tar(tmp_path / f"{name}.tar", sample("0", 0))
    assert keys(opened("webdataset", tmp_path, "all")) == ["x/0", "y/0"]


def test_tars_that_are_cut_short_or_compressed_are_refused_by_name(tmp_path):
    path = write_tar(tmp_path / "000.tar", sample("a", 0), sample("b", 0))
    data = path.read_bytes()
    for length in (700, 1024, 2048):  # in a member, between two, without the end mark
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="000.tar is not a complete, uncompressed tar"):
            opened("webdataset", tmp_path, "all")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "a.png")
    with pytest.raises(ValueError, match="000.tar is not a complete, uncompressed tar"):
        opened("webdataset", tmp_path, "all")


def test_a_damaged_label_is_refused_by_name(tmp_path):
    for damaged in ({"cls": b"cat"}, {"json": b"{"}, {"json": b"[1]"}):
        write_tar(tmp_path / "000.tar", sample("a", 0, **damaged))
        with pytest.raises(ValueError, match="000.tar: the label of sample a is damaged"):
            opened("webdataset", tmp_path, "all")


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .tar in it"):
        opened("webdataset", tmp_path, "all")


@pytest.mark.parametrize(
    "options",
    [
        {"name": "mnist"},
        {"resolution": 0},
        {"resize": 16},
        {"crop": "left"},
        {"val_fraction": 1.0},
        {"num_workers": -1},
    ],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"data.{next(iter(options))}="):
        DataConfig(**options)


# Changing these moves samples between the splits of runs that exist.
FIRST_VAL_DIGITS = ["0/0000", "5/0005", "6/0006", "9/0009"]
