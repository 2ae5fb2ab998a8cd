"""Shards written by hand to docs/artifacts.md, seeded weights, and no way to the network."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.features.inception import Inception

TOKENIZER = {"id": "outputs/tokenizer/toy", "digest": "sha256:" + "0" * 64}


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """Empty caches and a proxy that refuses connections, for this process and its children."""
    empty = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OMV2_CACHE", str(empty / "omv2"))
    monkeypatch.setenv("TORCH_HOME", str(empty / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A state dict of the Inception network with seeded weights, in the public layout."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # so that pictures differ in the last layers too
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 1.0, 2.0)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    torch.nn.init.normal_(network.fc.weight, 0, 0.5)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def alexnet_file(tmp_path_factory):
    """A state dict in torchvision's AlexNet layout with seeded weights."""
    from torchvision.models import alexnet

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(alexnet(weights=None).state_dict(), path)
    return path


@pytest.fixture
def pictures():
    """Return n smooth random pictures, uint8 [n, size, size, 3]."""

    def make(n, size=32, seed=0):
        coarse = np.random.default_rng(seed).random((n, 3, 6, 6), dtype=np.float32)
        smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), size, mode="bilinear")
        return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    return make


@pytest.fixture
def degraded():
    """Return the pictures with seeded noise."""

    def make(images, amount=12, seed=1):
        noise = np.random.default_rng(seed).integers(-amount, amount + 1, images.shape)
        return np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def write_media():
    """Return a function that writes media shards, `pairs` if there are reconstructions."""
    return _write_media


def _write_media(
    folder, images, reconstructions=None, encoding="npy", block=4, per_shard=8, bits=10, cls=None
):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "images" if reconstructions is None else "pairs"
    cls = np.arange(len(images)) % 3 if cls is None else np.asarray(cls)
    indices = np.random.default_rng(5).integers(0, 2**bits, (len(images), 1, 4, 4), dtype=np.uint32)
    keys = [f"c{label}/{i:08d}" for i, label in enumerate(cls)]
    arrays = {"images": images}
    if kind == "pairs":
        arrays = {"original": images, "reconstruction": reconstructions, "indices": indices}
    shards = []
    for number, first in enumerate(range(0, len(images), per_shard)):
        last = min(first + per_shard, len(images))
        path = folder / f"shard-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            if encoding == "npy":
                blocks = _write_blocks(tar, number, first, last, block, arrays, cls, keys)
            else:
                blocks = None
                _write_samples(tar, number, first, last, arrays, cls, keys)
        data = path.read_bytes()
        entry = {
            "file": path.name,
            "sha256": "sha256:" + hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "num_samples": last - first,
        }
        shards.append(entry | ({"blocks": blocks} if blocks else {}))
    manifest = {
        "format": "omv2-media-shards",
        "version": 1,
        "kind": kind,
        "encoding": encoding,
        "resolution": list(images.shape[1:3]),
        "tokenizer": TOKENIZER,
        "codebook_bits": bits,
        "grid": [4, 4],
        "block_size": block,
        "num_samples": len(images),
        "class_names": ["c0", "c1", "c2"],
        "source": {"name": "toy", "split": "val"},
        "skipped": {"count": 0, "reasons": {}, "examples": []},
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset


def _npy(array):
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array))
    return stream.getvalue()


def _write_blocks(tar, shard, first, last, block, arrays, cls, keys):
    blocks = []
    for number, start in enumerate(range(first, last, block)):
        stop = min(start + block, last)
        name = f"{shard:04d}{number:04d}"
        offsets = {
            field: _add(tar, f"{name}.{field}.npy", _npy(array[start:stop]))
            for field, array in arrays.items()
        }
        offsets["cls"] = _add(tar, f"{name}.cls.npy", _npy(cls[start:stop].astype(np.int32)))
        offsets["key"] = _add(tar, f"{name}.key.json", json.dumps(keys[start:stop]).encode())
        blocks.append({"name": name, "num_samples": stop - start, "offsets": offsets})
    return blocks


def _write_samples(tar, shard, first, last, arrays, cls, keys):
    for i in range(first, last):
        name = f"{shard:06d}-{i - first:06d}"
        for field, array in arrays.items():
            if field == "indices":
                _add(tar, f"{name}.indices.npy", _npy(array[i, 0]))
                continue
            stream = io.BytesIO()
            Image.fromarray(array[i]).save(stream, "PNG")
            _add(tar, f"{name}{'' if field == 'images' else '.' + field}.png", stream.getvalue())
        _add(tar, f"{name}.cls", str(cls[i]).encode())
        _add(tar, f"{name}.json", json.dumps({"key": keys[i]}).encode())
