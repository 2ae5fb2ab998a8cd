"""Index shards and media shards: tars of blocks or of PNG files (docs/artifacts.md).

The bytes of a tar depend on its samples only: members have fixed owners and times, and come in the
order in which they are added.
"""

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.files import file_digest, read_json

INDEX_FORMAT = "omv2-index-shards"
MEDIA_FORMAT = "omv2-media-shards"
VERSION = 1
BLOCK_SIZE = 256
MANIFEST_FILE = "manifest.json"

# Compressing PNG is the slowest thing that a writer does, and zlib releases the interpreter.
_PNG_THREADS = 4


@dataclass(frozen=True)
class Samples:
    """Some samples of a shard, in order."""

    arrays: dict[str, NDArray[Any]]  # [n, ...] each: indices uint32, pictures uint8 [n, h, w, 3]
    cls: NDArray[np.int32]  # [n]
    keys: list[str]

    def __getitem__(self, part: slice) -> "Samples":
        arrays = {name: array[part] for name, array in self.arrays.items()}
        return Samples(arrays, self.cls[part], self.keys[part])


def concatenate(parts: list[Samples]) -> Samples:
    """Join samples that have the same arrays."""
    arrays = {
        name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays
    }
    keys = [key for part in parts for key in part.keys]
    return Samples(arrays, np.concatenate([part.cls for part in parts]), keys)


def encode_png(pictures: NDArray[np.uint8]) -> Iterator[bytes]:
    """Yield the PNG file of each picture of uint8 [n, h, w, 3]."""

    def encode(picture: NDArray[np.uint8]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        return buffer.getvalue()

    with ThreadPoolExecutor(_PNG_THREADS) as pool:
        yield from pool.map(encode, pictures)


def encode_npy(array: NDArray[Any]) -> bytes:
    """Return the `.npy` file of an array."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


class ShardWriter:
    """Writes `shard-NUMBER.tar` as blocks (encoding `npy`) or one set of files per sample (`png`).

    Used as: add, add, ..., finish. Nothing has the final name before `finish`.
    """

    def __init__(self, folder: Path, number: int, encoding: str) -> None:
        if number > 9999 and encoding == "npy":
            raise ValueError(f"shard {number}: at most 10,000 shards; raise samples_per_shard")
        self._path = folder / f"shard-{number:06d}.tar"
        self._number = number
        self._encoding = encoding
        self._file = open(f"{self._path}.tmp", "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._pending: list[Samples] = []
        self._blocks: list[dict[str, Any]] = []
        self._num_samples = 0

    def add(self, samples: Samples) -> None:
        """Append samples; with encoding `npy` they are written block by block."""
        if self._encoding == "png":
            self._write_files(samples)
            return
        self._pending.append(samples)
        if sum(len(part.keys) for part in self._pending) >= BLOCK_SIZE:
            pending = concatenate(self._pending)
            while len(pending.keys) >= BLOCK_SIZE:
                self._write_block(pending[:BLOCK_SIZE])
                pending = pending[BLOCK_SIZE:]
            self._pending = [pending]

    def finish(self) -> dict[str, Any]:
        """Publish the tar and return its entry in the manifest."""
        if self._pending:
            self._write_block(concatenate(self._pending))
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        temporary = Path(self._file.name)
        entry: dict[str, Any] = {
            "file": self._path.name,
            "sha256": file_digest(temporary),
            "size": temporary.stat().st_size,
            "num_samples": self._num_samples,
        }
        if self._encoding == "npy":
            entry["blocks"] = self._blocks
        temporary.replace(self._path)
        return entry

    def _write_block(self, samples: Samples) -> None:
        if not samples.keys:
            return
        name = f"{self._number:04d}{len(self._blocks):04d}"
        offsets = {
            field: self._write_member(f"{name}.{field}.npy", encode_npy(array))
            for field, array in {**samples.arrays, "cls": samples.cls}.items()
        }
        offsets["key"] = self._write_member(f"{name}.key.json", json.dumps(samples.keys).encode())
        count = len(samples.keys)
        self._blocks.append({"name": name, "num_samples": count, "offsets": offsets})
        self._num_samples += count

    def _write_files(self, samples: Samples) -> None:
        pictures = [name for name, array in samples.arrays.items() if array.dtype == np.uint8]
        streams = {name: encode_png(samples.arrays[name]) for name in pictures}
        for i, key in enumerate(samples.keys):
            name = f"{self._number:06d}-{self._num_samples:06d}"
            for field, array in samples.arrays.items():
                if field in streams:
                    suffix = "png" if field == "images" else f"{field}.png"
                    self._write_member(f"{name}.{suffix}", next(streams[field]))
                else:  # of one sample, without the axis of views: indices [h, w]
                    self._write_member(f"{name}.{field}.npy", encode_npy(array[i, 0]))
            self._write_member(f"{name}.cls", str(samples.cls[i]).encode())
            self._write_member(f"{name}.json", json.dumps({"key": key}).encode())
            self._num_samples += 1

    def _write_member(self, name: str, data: bytes) -> int:
        """Append a file and return the offset of its data."""
        member = tarfile.TarInfo(name)  # owner, group and time are 0
        member.size = len(data)
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(member, io.BytesIO(data))
        return offset


def read_manifest(folder: Path, expected_format: str) -> dict[str, Any]:
    """Return the manifest of a complete folder of shards whose files all have their full size.

    Raises:
        FileNotFoundError: no such folder, no manifest, or a shard is missing.
        ValueError: another format or version, or a shard of another size.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of shards")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the folder holds no shards, or the command that writes it has not "
            "finished; run that again"
        )
    manifest = read_json(path, expected_format, VERSION)
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though the manifest names it")
        if file.stat().st_size != shard["size"]:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes instead of {shard['size']}: copy it again"
            )
    return manifest


@dataclass(frozen=True)
class _Block:
    path: Path
    name: str
    num_samples: int
    offsets: dict[str, int]


class IndexShards:
    """A folder of index shards, read by sample position through memory maps."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder, INDEX_FORMAT)
        self._blocks = [
            _Block(folder / shard["file"], block["name"], block["num_samples"], block["offsets"])
            for shard in self.manifest["shards"]
            for block in shard["blocks"]
        ]
        self._ends = list(accumulate(block.num_samples for block in self._blocks))
        if len(self) != self.manifest["num_samples"]:
            raise ValueError(
                f"{folder / MANIFEST_FILE}: its blocks have {len(self)} samples instead of "
                f"{self.manifest['num_samples']}"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Samples:
        """Return the samples start..stop, with `indices` uint32 [n, views, h, w]."""
        parts = []
        position = start
        while position < stop:
            number = bisect_right(self._ends, position)
            block = self._blocks[number]
            first = self._ends[number] - block.num_samples
            part = slice(position - first, min(stop - first, block.num_samples))
            parts.append(self._read_block(block)[part])
            position = first + part.stop
        return concatenate(parts)

    def _read_block(self, block: _Block) -> Samples:
        shape = (block.num_samples, len(self.manifest["views"]), *self.manifest["grid"])
        keys = json.loads(_member(block, "key", "json"))
        if len(keys) != block.num_samples:
            raise ValueError(f"{block.path}: block {block.name} has {len(keys)} keys")
        return Samples(
            {"indices": _array(block, "indices", np.dtype(np.uint32), shape)},
            _array(block, "cls", np.dtype(np.int32), shape[:1]),
            keys,
        )


def _header(block: _Block, field: str, extension: str) -> tarfile.TarInfo:
    """Return the tar header before a member's data; it must name this member."""
    name = f"{block.name}.{field}.{extension}"
    with open(block.path, "rb") as file:
        file.seek(block.offsets[field] - tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
        except tarfile.HeaderError:
            member = tarfile.TarInfo()
    if member.name != name:
        raise ValueError(f"{block.path}: {name} is not where the manifest says; copy it again")
    return member


def _member(block: _Block, field: str, extension: str) -> bytes:
    size = _header(block, field, extension).size
    with open(block.path, "rb") as file:
        file.seek(block.offsets[field])
        return file.read(size)


def _array(block: _Block, field: str, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray[Any]:
    """Memory-map an array of a block."""
    _header(block, field, "npy")
    with open(block.path, "rb") as file:
        file.seek(block.offsets[field])
        np.lib.format.read_magic(file)
        found_shape, _, found_dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    if (found_shape, found_dtype) != (shape, dtype):
        raise ValueError(
            f"{block.path}: {block.name}.{field}.npy is {found_dtype} {list(found_shape)}, the "
            f"manifest says {dtype} {list(shape)}"
        )
    return np.memmap(block.path, dtype=dtype, mode="r", offset=offset, shape=shape)


def json_digest(content: Any) -> str:
    """Return `sha256:...` of a JSON value, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
