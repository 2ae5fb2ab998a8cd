"""Shards: readable by webdataset, memory-mapped by us, the same bytes however they are added."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tokenizer.files import file_digest
from tokenizer.shards import (
    INDEX_FORMAT,
    IndexShards,
    Samples,
    ShardWriter,
    concatenate,
    read_manifest,
)

LARGEST = 2**18 - 1


def tokens(count: int, views: int = 2, first: int = 0) -> Samples:
    indices = np.random.default_rng(0).integers(0, LARGEST + 1, (first + count, views, 3, 4))
    indices[:, 0, 0, 0], indices[:, 0, 2, 3] = 0, LARGEST
    return Samples(
        {"indices": indices[first:].astype(np.uint32)},
        np.arange(first, first + count, dtype=np.int32) - 1,
        [f"class/{i:05d}.JPEG" for i in range(first, first + count)],
    )


def pairs(count: int) -> Samples:
    generator = np.random.default_rng(1)
    pictures = generator.integers(0, 256, (2, count, 8, 8, 3), dtype=np.uint8)
    arrays = {"original": pictures[0], "reconstruction": pictures[1]}
    arrays["indices"] = generator.integers(0, LARGEST, (count, 1, 2, 2), dtype=np.uint32)
    return Samples(arrays, np.zeros(count, np.int32), [f"{i}.png" for i in range(count)])


def write(folder: Path, number: int, samples: Samples, step: int, encoding: str = "npy") -> dict:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, number, encoding)
    for i in range(0, len(samples.keys), step):
        writer.add(samples[i : i + step])
    return writer.finish()


def write_folder(folder: Path, sizes: list[int]) -> Samples:
    """Write index shards of these sizes with their manifest."""
    parts = [tokens(size, first=sum(sizes[:i])) for i, size in enumerate(sizes)]
    shards = [write(folder, number, part, 100) for number, part in enumerate(parts)]
    manifest = {
        "format": INDEX_FORMAT,
        "version": 1,
        "views": [{"name": "center"}, {"name": "flip"}],
        "grid": [3, 4],
        "num_samples": sum(sizes),
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return concatenate(parts)


def read_by_webdataset(path: Path) -> list[dict]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False).decode())


def test_webdataset_reads_the_blocks_that_were_written(tmp_path):
    samples = tokens(600)
    write(tmp_path, 3, samples, 70)
    blocks = read_by_webdataset(tmp_path / "shard-000003.tar")
    assert [block["__key__"] for block in blocks] == ["00030000", "00030001", "00030002"]
    assert [len(block["cls.npy"]) for block in blocks] == [256, 256, 88]
    indices = np.concatenate([block["indices.npy"] for block in blocks])
    assert indices.dtype == np.uint32
    assert np.array_equal(indices, samples.arrays["indices"])
    assert (indices.min(), indices.max()) == (0, LARGEST)
    cls = np.concatenate([block["cls.npy"] for block in blocks])
    assert cls.dtype == np.int32 and np.array_equal(cls, samples.cls)
    assert sum((block["key.json"] for block in blocks), []) == samples.keys


def test_the_entry_describes_the_file(tmp_path):
    entry = write(tmp_path, 0, tokens(300), 300)
    path = tmp_path / entry["file"]
    assert entry["size"] == path.stat().st_size and entry["sha256"] == file_digest(path)
    assert [block["num_samples"] for block in entry["blocks"]] == [256, 44]
    with tarfile.open(path) as tar:
        places = {member.name: member.offset_data for member in tar}
    names = {"indices": "indices.npy", "cls": "cls.npy", "key": "key.json"}
    for block in entry["blocks"]:
        for field, offset in block["offsets"].items():
            assert places[f"{block['name']}.{names[field]}"] == offset
            assert offset % 512 == 0


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_the_bytes_do_not_depend_on_how_samples_are_added(tmp_path, encoding):
    samples = tokens(530) if encoding == "npy" else pairs(30)
    digests = {
        write(tmp_path / str(step), 0, samples, step, encoding)["sha256"] for step in (7, 256, 530)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_both_encodings_of_pairs_hold_the_same(tmp_path, encoding):
    samples = pairs(5)
    entry = write(tmp_path, 12, samples, 2, encoding)
    assert ("blocks" in entry) == (encoding == "npy")
    found = list(
        webdataset.WebDataset(str(tmp_path / entry["file"]), shardshuffle=False).decode("rgb8")
    )
    if encoding == "npy":
        (block,) = found
        for field, array in samples.arrays.items():
            assert np.array_equal(block[f"{field}.npy"], array)
        return
    assert [sample["__key__"] for sample in found] == [f"000012-{i:06d}" for i in range(5)]
    for i, sample in enumerate(found):
        assert np.array_equal(sample["original.png"], samples.arrays["original"][i])
        assert np.array_equal(sample["reconstruction.png"], samples.arrays["reconstruction"][i])
        assert np.array_equal(sample["indices.npy"], samples.arrays["indices"][i, 0])
        assert sample["cls"] == 0 and sample["json"] == {"key": samples.keys[i]}


def test_a_shard_may_be_empty(tmp_path):
    writer = ShardWriter(tmp_path, 0, "npy")
    writer.add(tokens(0))
    entry = writer.finish()
    assert (entry["num_samples"], entry["blocks"]) == (0, [])


def test_nothing_has_its_final_name_before_it_is_complete(tmp_path):
    writer = ShardWriter(tmp_path, 0, "npy")
    writer.add(tokens(300))
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar.tmp"]
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_samples_are_read_across_blocks_and_shards(tmp_path):
    samples = write_folder(tmp_path / "t", [300, 0, 20, 260])
    shards = IndexShards(tmp_path / "t")
    assert len(shards) == 580
    for start, stop in [(0, 580), (250, 330), (299, 301), (579, 580), (0, 1)]:
        part = shards.read(start, stop)
        assert np.array_equal(part.arrays["indices"], samples.arrays["indices"][start:stop])
        assert np.array_equal(part.cls, samples.cls[start:stop])
        assert part.keys == samples.keys[start:stop]


def test_a_reader_refuses_by_name(tmp_path):
    folder = tmp_path / "t"
    with pytest.raises(FileNotFoundError, match="t: no such folder of shards"):
        IndexShards(folder)
    write_folder(folder, [20])
    manifest = json.loads((folder / "manifest.json").read_text())

    def refused(error: type[Exception], match: str, **changes) -> None:
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(error, match=match):
            IndexShards(folder).read(0, 20)

    refused(ValueError, "format is 'x', expected 'omv2-index-shards'", format="x")
    refused(ValueError, "version is 2, this program reads 1", version=2)
    refused(ValueError, "blocks have 20 samples instead of 21", num_samples=21)
    refused(ValueError, r"indices.npy is uint32 \[20, 2, 3, 4\], the manifest says", grid=[4, 3])
    shard = manifest["shards"][0]
    block = shard["blocks"][0]
    moved = {**block, "offsets": {**block["offsets"], "cls": block["offsets"]["cls"] + 512}}
    refused(
        ValueError,
        "shard-000000.tar: 00000000.cls.npy is not where the manifest says",
        shards=[{**shard, "blocks": [moved]}],
    )
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    refused(ValueError, "shard-000000.tar has [0-9]+ bytes instead of [0-9]+: copy it again")
    path.unlink()
    refused(FileNotFoundError, "shard-000000.tar is missing, though the manifest names it")
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        read_manifest(folder, INDEX_FORMAT)
