"""The three commands between pictures and tokens, with a tokenizer that can be checked by hand.

Its token is the mean colour of a patch of 8 x 8 pixels in 6 bits per channel, red lowest.
"""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from accelerate.state import AcceleratorState
from PIL import Image

from tokenizer import decode, encode, job, reconstruct
from tokenizer.config import (
    DataConfig,
    DecodeConfig,
    EncodeConfig,
    ModelConfig,
    ReconstructConfig,
)
from tokenizer.shards import IndexShards, ShardWriter


class PatchColour(torch.nn.Module):
    config = SimpleNamespace(bits=18)
    downsample = 8

    def __init__(self, name: str) -> None:
        super().__init__()
        self.id = name
        self.digest = "sha256:" + name[-1] * 64

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        patches = images.double().unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5))
        levels = (patches / 255 * 63).round().long()
        return levels[:, 0] + (levels[:, 1] << 6) + (levels[:, 2] << 12)

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        levels = torch.stack([indices & 63, (indices >> 6) & 63, indices >> 12], 1)
        pixels = (levels * 255 / 63).round().to(torch.uint8)
        return pixels.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(autouse=True)
def patch_colour(monkeypatch):
    """Any checkpoint is the tokenizer above; each test starts as a fresh process would."""
    AcceleratorState._reset_state(True)
    monkeypatch.setattr("tokenizer.export.Tokenizer.from_pretrained", PatchColour)
    yield
    AcceleratorState._reset_state(True)


def run(command, config) -> None:
    inspect.unwrap(command.main)(config)


def colours() -> np.ndarray:
    """Pictures [20, 16, 24, 3] of 6 patches; the first is black, the second white."""
    patches = np.random.default_rng(0).integers(0, 64, (20, 2, 3, 3)) * 255 // 63
    patches[0], patches[1] = 0, 255
    return patches.repeat(8, 1).repeat(8, 2).astype(np.uint8)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """A folder of 20 pictures in two classes, of which number 7 is damaged, and a text file."""
    for i, picture in enumerate(colours()):
        path = tmp_path / "data" / ("cat" if i < 12 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        if i == 7:
            path.write_bytes(path.read_bytes()[:60])
    (tmp_path / "data" / "cat" / "readme.txt").write_text("cats")
    root = str(tmp_path / "data")
    return DataConfig(name="folder", root=root, split="all", resolution=16, num_workers=0)


READABLE = [i for i in range(20) if i != 7]


def expected_tokens(flip: bool = False) -> np.ndarray:
    """[19, 2, 2]: the centre crop of 16 x 24 pictures starts at column 4, within the patches."""
    crop = colours()[READABLE, :, 4:20].astype(float)
    if flip:
        crop = crop[:, :, ::-1]
    means = crop.reshape(19, 2, 8, 2, 8, 3).mean((2, 4))
    return np.rint(means / 255 * 63).astype(int) @ [1, 64, 4096]


def encode_config(data: DataConfig, out: Path, **options) -> EncodeConfig:
    defaults = {"ckpt": "tokenizer-a", "samples_per_shard": 6, "batch_size": 4}
    return EncodeConfig(data=data, out=str(out), **{**defaults, **options})


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_encode_writes_the_tokens_of_every_readable_picture(data, tmp_path, capsys):
    out = tmp_path / "tokens"
    run(encode, encode_config(data, out, views=["center", "flip"]))
    samples = IndexShards(out).read(0, 19)
    indices = samples.arrays["indices"]
    assert indices.shape == (19, 2, 2, 2)
    assert np.array_equal(indices[:, 0], expected_tokens())
    assert np.array_equal(indices[:, 1], expected_tokens(flip=True))
    assert (indices.min(), indices.max()) == (0, 2**18 - 1)
    assert samples.cls.tolist() == [0] * 11 + [1] * 8
    assert samples.keys == [f"{'cat' if i < 12 else 'dog'}/{i:02d}.png" for i in READABLE]

    manifest = manifest_of(out)
    assert manifest["tokenizer"] == {"id": "tokenizer-a", "digest": "sha256:" + "a" * 64}
    assert (manifest["codebook_bits"], manifest["grid"]) == (18, [2, 2])
    assert manifest["views"] == [{"name": "center"}, {"name": "flip"}]
    assert manifest["class_names"] == ["cat", "dog"] and manifest["precision"] == "fp32"
    assert [shard["num_samples"] for shard in manifest["shards"]] == [6, 5, 6, 2]
    assert manifest["skipped"] == {
        "count": 2,
        "reasons": {"not a picture by its name": 1, "truncated": 1},
        "examples": ["cat/readme.txt: not a picture by its name", "cat/07.png: truncated"],
    }
    assert "cat/07.png: truncated" in capsys.readouterr().out
    assert sorted(contents(out)) == ["manifest.json"] + [f"shard-00000{i}.tar" for i in range(4)]


def test_bytes_do_not_depend_on_batches_or_workers(data, tmp_path):
    run(encode, encode_config(data, tmp_path / "a", views=["random:3"]))
    data.num_workers = 2
    run(encode, encode_config(data, tmp_path / "b", views=["random:3"], batch_size=7))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_random_views_differ_and_follow_the_seed(data, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        run(encode, encode_config(data, tmp_path / name, views=["random:2"], seed=seed))
    a, b = (IndexShards(tmp_path / name).read(0, 19).arrays["indices"] for name in "ab")
    assert not np.array_equal(a[:, 0], a[:, 1])
    assert np.array_equal(a[:, 1], b[:, 0])  # both have the seed 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(1, 12))
def test_a_command_killed_at_any_file_resumes_to_the_same_bytes(data, tmp_path, monkeypatch, calls):
    run(encode, encode_config(data, tmp_path / "whole"))
    config = encode_config(data, tmp_path / "killed")
    rename, remaining = Path.replace, [calls]

    def replace_or_die(self: Path, target: Path) -> Path:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_die)
    try:
        run(encode, config)
        assert calls > 9  # job.json, two files for each of the four shards, manifest.json
    except Killed:
        assert not (tmp_path / "killed" / "manifest.json").exists()
    monkeypatch.setattr(Path, "replace", rename)
    run(encode, config)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_finished_shards_are_not_written_again(data, tmp_path, monkeypatch):
    config = encode_config(data, tmp_path / "out")
    written: list[int] = []

    def record(folder: Path, number: int, encoding: str) -> ShardWriter:
        written.append(number)
        if written == [0, 1, 2]:
            raise Killed
        return ShardWriter(folder, number, encoding)

    monkeypatch.setattr(encode, "ShardWriter", record)
    with pytest.raises(Killed):
        run(encode, config)
    run(encode, config)
    assert written == [0, 1, 2, 2, 3]


def test_a_finished_shard_whose_file_is_damaged_is_written_again(data, tmp_path):
    run(encode, encode_config(data, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    nothing = {"count": 0, "reasons": {}, "examples": []}
    for number, entry in enumerate(manifest["shards"]):
        entry["skipped"] = manifest["skipped"] if number == 1 else nothing
        (tmp_path / "out" / f"shard-00000{number}.json").write_text(json.dumps(entry))
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"cut short")
    run(encode, encode_config(data, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_complete_folder_is_left_alone(data, tmp_path, capsys):
    config = encode_config(data, tmp_path / "out")
    run(encode, config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / job.JOB_FILE).write_text(  # as after a kill just before its removal
        json.dumps({k: v for k, v in manifest_of(tmp_path / "out").items() if k != "shards"})
    )
    capsys.readouterr()
    run(encode, config)
    assert "out is complete: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_request_for_the_same_folder_is_refused(data, tmp_path, finished):
    out = tmp_path / "out"
    run(encode, encode_config(data, out))
    if not finished:
        (out / "manifest.json").rename(out / "job.json")
    with pytest.raises(ValueError, match="out was begun with another views"):
        run(encode, encode_config(data, out, views=["flip"]))
    with pytest.raises(ValueError, match="out was begun with another tokenizer"):
        run(encode, encode_config(data, out, ckpt="tokenizer-b"))
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "cat" / "new.png")
    with pytest.raises(ValueError, match="out was begun with another source"):
        run(encode, encode_config(data, out))


def test_a_checkpoint_called_by_another_path_continues(data, tmp_path, capsys):
    run(encode, encode_config(data, tmp_path / "out"))
    run(encode, encode_config(data, tmp_path / "out", ckpt="/elsewhere/tokenizer-a"))
    assert "nothing to do" in capsys.readouterr().out


def test_nothing_readable_is_an_error(data, tmp_path):
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="nothing could be used: 20 not a picture"):
        run(encode, encode_config(data, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("command", [encode, reconstruct])
def test_a_resolution_that_does_not_fit_names_the_nearest(data, tmp_path, command):
    data.resolution = 20
    types = {encode: EncodeConfig, reconstruct: ReconstructConfig}
    config = types[command](ckpt="tokenizer-a", data=data, out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="data.resolution=20.* multiple of 8, such as 16 or 24"):
        run(command, config)


def decode_config(tokens: Path, out: Path, **options) -> DecodeConfig:
    defaults = {"ckpt": "tokenizer-a", "samples_per_shard": 8, "batch_size": 3}
    return DecodeConfig(tokens=str(tokens), out=str(out), **{**defaults, **options})


@pytest.fixture
def tokens(data, tmp_path) -> Path:
    run(encode, encode_config(data, tmp_path / "tokens", views=["center", "flip"]))
    return tmp_path / "tokens"


def expected_pictures(flip: bool = False) -> np.ndarray:
    index = expected_tokens(flip)
    levels = np.stack([index & 63, (index >> 6) & 63, index >> 12], -1)
    return np.rint(levels * 255 / 63).repeat(8, 1).repeat(8, 2).astype(np.uint8)


def read_tars(folder: Path) -> list[dict]:
    paths = [str(folder / shard["file"]) for shard in manifest_of(folder)["shards"]]
    return list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8"))


@pytest.mark.parametrize("view", [0, 1])
def test_decode_gives_the_same_pictures_in_every_format(tokens, tmp_path, view):
    expected = expected_pictures(flip=view == 1)
    keys = IndexShards(tokens).read(0, 19).keys
    for format in ("npy", "png", "folder", "npz"):
        run(decode, decode_config(tokens, tmp_path / format, format=format, view=view))
    blocks = read_tars(tmp_path / "npy")
    assert np.array_equal(np.concatenate([block["images.npy"] for block in blocks]), expected)
    assert sum((block["key.json"] for block in blocks), []) == keys
    files = read_tars(tmp_path / "png")
    assert np.array_equal([sample["png"] for sample in files], expected)
    assert [sample["json"]["key"] for sample in files] == keys
    assert [sample["cls"] for sample in files] == [0] * 11 + [1] * 8
    found = [np.asarray(Image.open(tmp_path / "folder" / f"{key}.png")) for key in keys]
    assert np.array_equal(found, expected)
    with np.load(tmp_path / "npz" / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_1"].dtype == np.int64
        assert np.array_equal(archive["arr_0"], expected)
        assert archive["arr_1"].tolist() == [0] * 11 + [1] * 8
    for format in ("npy", "png"):
        manifest = manifest_of(tmp_path / format)
        assert manifest["kind"] == "images" and manifest["encoding"] == format
        assert manifest["resolution"] == [16, 16] and manifest["num_samples"] == 19
        assert manifest["source"]["view"] == view
    names = sorted(path.name for path in (tmp_path / "npz").iterdir())
    assert names == ["decode.json", "samples.npz"]


@pytest.mark.parametrize("format", ["npy", "png", "folder", "npz"])
def test_a_killed_decode_resumes_to_the_same_bytes(tokens, tmp_path, monkeypatch, format):
    run(decode, decode_config(tokens, tmp_path / "whole", format=format))
    config = decode_config(tokens, tmp_path / "killed", format=format)
    write_json, calls = job.write_json, []

    def write_or_die(path: Path, content: object) -> None:
        calls.append(path)
        if len(calls) == 4:  # after two of the three parts
            raise Killed
        write_json(path, content)

    monkeypatch.setattr(job, "write_json", write_or_die)
    with pytest.raises(Killed):
        run(decode, config)
    monkeypatch.setattr(job, "write_json", write_json)
    run(decode, config)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_decode_refuses_the_tokens_of_another_tokenizer(tokens, tmp_path):
    config = decode_config(tokens, tmp_path / "out", ckpt="tokenizer-b")
    with pytest.raises(ValueError, match="of the tokenizer tokenizer-a .*ckpt=tokenizer-b"):
        run(decode, config)
    config.allow_other_tokenizer = True
    run(decode, config)
    assert manifest_of(tmp_path / "out")["tokenizer"]["id"] == "tokenizer-b"


def test_decode_refuses_a_view_that_is_not_there(tokens, tmp_path):
    with pytest.raises(ValueError, match="view=2: .* have the views 0 to 1"):
        run(decode, decode_config(tokens, tmp_path / "out", view=2))


def test_decode_refuses_another_codebook_and_videos(tokens, tmp_path):
    manifest = manifest_of(tokens)
    for change, match in [({"codebook_bits": 10}, "have 10 bits"), ({"grid": [5, 2, 2]}, "videos")]:
        (tokens / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=match):
            run(decode, decode_config(tokens, tmp_path / "out"))


def test_decode_to_a_folder_stays_inside_it(tmp_path):
    from tokenizer.picture_files import PictureFolder
    from tokenizer.shards import Samples

    picture = {"images": np.zeros((1, 8, 8, 3), np.uint8)}
    for key in ("../outside", "/tmp/outside"):
        with pytest.raises(ValueError, match="would lead out of"):
            PictureFolder(tmp_path).add(Samples(picture, np.zeros(1, np.int32), [key]))


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_reconstruct_writes_pairs_with_their_tokens(data, tmp_path, encoding):
    out = tmp_path / "pairs"
    options = {"samples_per_shard": 6, "batch_size": 4, "encoding": encoding}
    run(reconstruct, ReconstructConfig(ckpt="tokenizer-a", data=data, out=str(out), **options))
    found = read_tars(out)
    original = colours()[READABLE, :, 4:20]
    if encoding == "npy":
        arrays = {
            name: np.concatenate([block[name] for block in found])
            for name in found[0]
            if name.endswith(".npy")
        }
        assert np.array_equal(arrays["original.npy"], original)
        assert np.array_equal(arrays["reconstruction.npy"], expected_pictures())
        assert np.array_equal(arrays["indices.npy"][:, 0], expected_tokens())
    else:
        assert np.array_equal([sample["original.png"] for sample in found], original)
        assert np.array_equal([s["reconstruction.png"] for s in found], expected_pictures())
        assert np.array_equal([sample["indices.npy"] for sample in found], expected_tokens())
    manifest = manifest_of(out)
    assert (manifest["kind"], manifest["encoding"]) == ("pairs", encoding)
    assert (manifest["resolution"], manifest["grid"]) == ([16, 16], [2, 2])
    assert manifest["codebook_bits"] == 18 and manifest["skipped"]["count"] == 2


@pytest.mark.parametrize(
    ("schema", "options"),
    [
        (EncodeConfig, {"batch_size": 0}),
        (EncodeConfig, {"precision": "fp16"}),
        (ReconstructConfig, {"samples_per_shard": 0}),
        (EncodeConfig, {"samples_per_shard": 10**7}),
        (ReconstructConfig, {"encoding": "jpg"}),
        (DecodeConfig, {"format": "jpg"}),
        (DecodeConfig, {"view": -1}),
    ],
)
def test_options_out_of_range_are_named(schema, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        schema(**options)


# The commands as processes, with a real (untrained) tokenizer.


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    monkeypatch.undo()
    from tokenizer.autoencoder import Tokenizer

    torch.manual_seed(0)
    model = ModelConfig(
        bits=10, base_channels=8, multipliers=[1, 1, 1, 1], blocks_per_level=1, norm_groups=4
    )
    Tokenizer(model).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def digits_config(checkpoint: Path, out: Path) -> EncodeConfig:
    data = DataConfig(num_workers=0)
    return EncodeConfig(ckpt=str(checkpoint), data=data, out=str(out), samples_per_shard=64)


def arguments(checkpoint: Path, out: Path) -> list[str]:
    return [
        "-m",
        "tokenizer.encode",
        f"ckpt={checkpoint}",
        "data=digits",
        "data.num_workers=0",
        f"out={out}",
        "samples_per_shard=64",
    ]


@pytest.mark.slow
def test_a_process_killed_at_work_is_continued_by_two(checkpoint, tmp_path):
    run(encode, digits_config(checkpoint, tmp_path / "whole"))
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments(checkpoint, out)], cwd=tmp_path, env=environment
    )
    while process.poll() is None and not (out / "shard-000001.json").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    result = subprocess.run(
        [*torchrun, *arguments(checkpoint, out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "shards are there already" in result.stdout
    assert result.stdout.count("wrote 1,437 samples") == 1
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", "whole"]
