"""Index shards: what is written is read, by us and by webdataset, and damage is refused by name."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ar.shard_writer import ShardJob, write_shard
from ar.shards import IndexShards


def test_samples_are_read_from_the_right_block_and_view(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_shards(num_samples=900, num_views=3, per_shard=400, bits=18)
    written = np.load(tmp_path / "shards.npy")  # [n, views, rows, columns]
    shards = IndexShards(folder)
    generator = np.random.default_rng(0)
    samples, views = generator.permutation(900), generator.integers(0, 3, 900)
    tokens, labels = shards.read(samples, views)
    assert tokens.dtype == np.int64
    assert np.array_equal(tokens, written[samples, views].reshape(900, -1))
    assert np.array_equal(labels, samples % 4)


def test_extreme_indices_survive(tmp_path: Path) -> None:
    indices = np.array([0, 2**18 - 1, 2**24 - 1, 1], np.uint32).reshape(1, 1, 2, 2)
    entry = write_shard(tmp_path, 0, indices, np.array([-1], np.int32), ["a"])
    request = {"tokenizer": {}, "codebook_bits": 24, "grid": [2, 2], "views": [{}]}
    request |= {"num_samples": 1, "class_names": None, "shards": [entry]}
    manifest = {"format": "omv2-index-shards", "version": 1, **request}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    tokens, labels = IndexShards(tmp_path).read(np.array([0]), np.array([0]))
    assert tokens.tolist() == [[0, 2**18 - 1, 2**24 - 1, 1]]
    assert labels.tolist() == [-1]


def test_webdataset_reads_the_shards(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards(num_samples=300, num_views=2)
    written = np.load(tmp_path / "shards.npy")
    blocks = list(
        webdataset.WebDataset(str(folder / "shard-000000.tar"), shardshuffle=False).decode()
    )
    assert [block["__key__"] for block in blocks] == ["00000000", "00000001"]
    assert [len(block["cls.npy"]) for block in blocks] == [256, 44]
    read = np.concatenate([block["indices.npy"] for block in blocks])
    assert read.dtype == np.uint32 and np.array_equal(read, written)
    assert blocks[1]["key.json"][0] == "0/256"


def test_manifest_offsets_point_at_the_members(make_shards: Callable[..., Path]) -> None:
    folder = make_shards(num_samples=600, per_shard=300)
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        with tarfile.open(folder / shard["file"]) as tar:
            starts = {member.name: member.offset_data for member in tar}
        for block in shard["blocks"]:
            for name, suffix in (("indices", "npy"), ("cls", "npy"), ("key", "json")):
                start = starts[f"{block['name']}.{name}.{suffix}"]
                assert block["offsets"][name] == start and start % 512 == 0


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "omv2-media-shards"}, "format 'omv2-media-shards'"),
        ({"version": 2}, "version 2"),
        ({"grid": [4, 4, 4]}, "only image grids"),
        ({"grid": [2, 8]}, r"expected uint32 \(64, 1, 2, 8\)"),
        ({"num_samples": 65}, "num_samples=65"),
        ({"codebook_bits": 5}, "beyond codebook_bits=5"),
        ({"class_names": ["a"]}, "class ids from 0 to 3"),
        ({"tokenizer": None}, "'tokenizer' is missing"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_name(
    make_shards: Callable[..., Path], changes: dict[str, object], message: str
) -> None:
    folder = make_shards()
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        IndexShards(folder).read(np.arange(64), np.zeros(64, np.int64))


def test_damaged_shards_are_refused(make_shards: Callable[..., Path]) -> None:
    folder = make_shards()
    path = folder / "shard-000000.tar"
    good = path.read_bytes()
    path.write_bytes(good[:-512])
    with pytest.raises(ValueError, match=r"shard-000000.tar: truncated"):
        IndexShards(folder)
    path.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    with pytest.raises(ValueError, match="sha256 differs"):
        IndexShards(folder).verify()
    path.write_bytes(bytes(512) + good[:-512])
    with pytest.raises(ValueError, match="offset 512 is not its start"):
        IndexShards(folder).read(np.array([0]), np.array([0]))
    path.write_bytes(good)
    IndexShards(folder).verify()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="not there"):
        IndexShards(folder)
    with pytest.raises(FileNotFoundError, match="no index shards in"):
        IndexShards(folder / "elsewhere")


def test_a_shard_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    indices = np.arange(300 * 4, dtype=np.uint32).reshape(300, 1, 2, 2)
    labels, keys = np.zeros(300, np.int32), [str(i) for i in range(300)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    entries = [write_shard(tmp_path / name, 3, indices, labels, keys) for name in ("a", "b")]
    assert entries[0] == entries[1]
    with tarfile.open(tmp_path / "a" / "shard-000003.tar") as tar:
        member = tar.extractfile("00030001.indices.npy")
        assert member is not None
        assert np.array_equal(np.load(io.BytesIO(member.read())), indices[256:])


def test_an_interrupted_job_writes_only_what_is_missing(tmp_path: Path) -> None:
    request = {"num_samples": 2, "seed": 0}

    def write(job: ShardJob, number: int) -> None:
        indices = np.full((1, 1, 2, 2), number, np.uint32)
        job.write(number, indices, np.zeros(1, np.int32), [f"{number}"])

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json.tmp").write_bytes(b"ha")  # killed at the very start
    job = ShardJob(tmp_path / "out", request, 2)
    job.begin()
    write(job, 0)
    with pytest.raises(ValueError, match="shard 1 is missing"):
        job.finish()
    first = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"half")  # no entry: not counted
    with pytest.raises(ValueError, match="seed: 0 there, 1 asked"):
        ShardJob(tmp_path / "out", {**request, "seed": 1}, 2)

    again = ShardJob(tmp_path / "out", request, 2)
    assert not again.finished and again.missing() == [1]
    again.begin()
    write(again, 1)
    again.finish()
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == first
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", "shard-000000.tar", "shard-000001.tar"]
    assert ShardJob(tmp_path / "out", request, 2).finished
    with pytest.raises(ValueError, match="another request"):
        ShardJob(tmp_path / "out", {**request, "seed": 1}, 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds other files"):
        ShardJob(tmp_path / "other", request, 2)
