"""Readers of tar files: media and index shards (docs/artifacts.md), webdatasets of images."""

import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.pictures import EXTENSIONS, channels_first, decode_batches
from eval.source import Batch, Source

INDEX_FORMAT = "omv2-index-shards"
MEDIA_FORMAT = "omv2-media-shards"
# What a manifest must say for us to read the shards.
REQUIRED = {
    INDEX_FORMAT: {
        *("codebook_bits", "views", "num_samples", "class_names", "shards"),
        *("tokenizer", "source"),
    },
    MEDIA_FORMAT: {
        *("kind", "encoding", "resolution", "num_samples", "class_names", "shards"),
        *("tokenizer", "source"),
    },
}
# The pictures of each kind of media shards; the first is the default.
FIELDS = {"images": ("images",), "pairs": ("original", "reconstruction")}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of shards after checking that all shards are complete."""
    path = folder / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"{folder}: unfinished, there is no manifest.json; run the command that writes it again"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    found = (manifest.get("format"), manifest.get("version"))
    if found not in ((INDEX_FORMAT, 1), (MEDIA_FORMAT, 1)):
        raise ValueError(f"{path}: format {found[0]!r} version {found[1]!r} is not known")
    missing = sorted(REQUIRED[found[0]] - manifest.keys())
    if missing:
        raise ValueError(f"{path}: has no {missing[0]!r}; write the shards again")
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.exists():
            raise FileNotFoundError(f"{file}: listed in the manifest but missing")
        if file.stat().st_size != shard["size"]:
            raise ValueError(
                f"{file}: {file.stat().st_size} bytes; the manifest says {shard['size']}"
            )
    return manifest


@dataclass(frozen=True)
class Maker:
    """The model that made the samples of a folder of shards."""

    checkpoint: dict[str, Any]  # {"id", "digest"}
    seed: int | None  # of sampling; None where nothing was drawn at random


def maker(manifest: dict[str, Any]) -> Maker:
    """Return who made shards: the model that generated them, else the tokenizer.

    Pictures that were decoded from tokens carry the `source` of these tokens inside their own.
    """
    source: dict[str, Any] = manifest["source"]
    while "checkpoint" not in source and isinstance(source.get("tokens"), dict):
        source = source["tokens"].get("source") or {}
    return Maker(source.get("checkpoint") or manifest["tokenizer"], source.get("seed"))


class IndexShards:
    """Token indices of a data set; iterating gives uint32 blocks [n, views, (t,) h, w] in order."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["format"] != INDEX_FORMAT:
            raise ValueError(
                f"{folder}: holds {manifest['format']}, not token indices ({INDEX_FORMAT})"
            )
        self.name = str(folder)
        self.manifest = manifest
        self.codebook_bits: int = manifest["codebook_bits"]
        self.class_names: list[str] | None = manifest["class_names"]
        self._folder = folder

    def __len__(self) -> int:
        return self.manifest["num_samples"]

    def __iter__(self) -> Iterator[np.ndarray]:
        for shard in self.manifest["shards"]:
            for block in shard["blocks"]:
                yield _array(self._folder / shard["file"], block["offsets"]["indices"])


@dataclass(frozen=True)
class _Block:
    """A block of an `npy` shard: where its arrays are."""

    file: Path
    offsets: dict[str, int]
    num_samples: int


class MediaShards(Source):
    """Pictures written by `tokenizer.reconstruct` (pairs) or `tokenizer.decode` (images)."""

    def __init__(self, folder: Path, manifest: dict[str, Any], field: str | None) -> None:
        if manifest["format"] != MEDIA_FORMAT:
            raise ValueError(
                f"{folder}: holds token indices, not pictures; decode them with tokenizer.decode"
            )
        for name, allowed in (("kind", tuple(FIELDS)), ("encoding", ("npy", "png"))):
            if manifest[name] not in allowed:
                raise ValueError(f"{folder}: {name} {manifest[name]!r} is not one of {allowed}")
        super().__init__(str(folder), manifest["class_names"])
        self.manifest = manifest
        self.kind: str = manifest["kind"]
        self.field = field or FIELDS[self.kind][0]
        if self.field not in FIELDS[self.kind]:
            raise ValueError(
                f"{folder}: has no field {field!r}; {self.kind} have {', '.join(FIELDS[self.kind])}"
            )
        if manifest["num_samples"] == 0:
            raise ValueError(f"{folder}: holds no pictures")
        self._blocks: list[_Block] = []
        self._members: list[_Sample] = []
        if manifest["encoding"] == "npy":
            self._blocks = [
                _Block(folder / shard["file"], block["offsets"], block["num_samples"])
                for shard in manifest["shards"]
                for block in shard["blocks"]
            ]
            self._ends = list(accumulate(block.num_samples for block in self._blocks))
            found = self._ends[-1] if self._ends else 0
        else:
            for shard in manifest["shards"]:
                self._members += _scan(folder / shard["file"])
            found = len(self._members)
        if found != manifest["num_samples"]:
            raise ValueError(
                f"{folder}: {found} samples; the manifest says {manifest['num_samples']}"
            )

    def __len__(self) -> int:
        return self.manifest["num_samples"]

    def read(self, start: int, stop: int) -> Iterator[Batch]:
        return self._read_blocks(start, stop) if self._blocks else self._read_members(start, stop)

    def _read_blocks(self, start: int, stop: int) -> Iterator[Batch]:
        images, cls, indices = [], [], []
        keys: list[str] = []
        position = start
        while position < stop:
            number = bisect_right(self._ends, position)
            block = self._blocks[number]
            first = position - (self._ends[number] - block.num_samples)
            last = min(first + stop - position, block.num_samples)
            images.append(self._field(block, self.field)[first:last])
            cls.append(np.asarray(self._field(block, "cls")[first:last], dtype=np.int64))
            keys += _json_member(block.file, block.offsets["key"])[first:last]
            if self.kind == "pairs":
                indices.append(
                    np.asarray(self._field(block, "indices")[first:last, 0], dtype=np.int64)
                )
            position += last - first
        yield Batch(
            images=channels_first(np.concatenate(images)),
            cls=torch.from_numpy(np.concatenate(cls)),
            keys=keys,
            indices=torch.from_numpy(np.concatenate(indices)) if indices else None,
            start=start,
        )

    def _field(self, block: _Block, name: str) -> np.ndarray:
        if name not in block.offsets:
            raise ValueError(f"{block.file}: the manifest gives no offset of {name!r}")
        array = _array(block.file, block.offsets[name])
        pictures = name == self.field
        if len(array) != block.num_samples or (
            pictures and (array.dtype != np.uint8 or array.ndim != 4)
        ):
            raise ValueError(
                f"{block.file}: {name} is {array.dtype} {list(array.shape)}, not as specified"
            )
        return array

    def _read_members(self, start: int, stop: int) -> Iterator[Batch]:
        samples = self._members[start:stop]
        extension = ".png" if self.kind == "images" else f".{self.field}.png"
        indices = None
        if self.kind == "pairs":
            arrays = (np.load(io.BytesIO(sample.read(".indices.npy"))) for sample in samples)
            indices = [array.astype(np.int64) for array in arrays]
        batches = decode_batches(
            start,
            [json.loads(sample.read(".json"))["key"] for sample in samples],
            lambda i: samples[i].read(extension),
            [sample.label() for sample in samples],
            self.converted,
            indices,
        )
        return batches


class WebDataset(Source):
    """A webdataset of images: per sample one image and, if there is a class, a `.cls` member."""

    def __init__(self, name: str, tars: list[Path]) -> None:
        super().__init__(name, None)
        self._members = [sample for tar in tars for sample in _scan(tar)]
        self._extensions: list[str] = []
        for sample in self._members:
            images = [extension for extension in sample.members if extension.lower() in EXTENSIONS]
            if len(images) != 1:
                raise ValueError(
                    f"{sample.file}: sample {sample.key} has {len(images)} images; expected one"
                )
            self._extensions.append(images[0])
        if not self._members:
            raise ValueError(f"{name}: no samples in {len(tars)} tar file(s)")

    def __len__(self) -> int:
        return len(self._members)

    def read(self, start: int, stop: int) -> Iterator[Batch]:
        samples = self._members[start:stop]
        extensions = self._extensions[start:stop]
        return decode_batches(
            start,
            [sample.key + extension for sample, extension in zip(samples, extensions, strict=True)],
            lambda i: samples[i].read(extensions[i]),
            [sample.label() for sample in samples],
            self.converted,
        )


@dataclass(frozen=True)
class _Sample:
    """The members of one webdataset sample: extension -> (offset, size) in the tar file."""

    file: Path
    key: str
    members: dict[str, tuple[int, int]]

    def read(self, extension: str) -> bytes:
        if extension not in self.members:
            raise ValueError(f"{self.file}: sample {self.key} has no {extension[1:]}")
        offset, size = self.members[extension]
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def label(self) -> int:
        """Return the class id, -1 where there is none."""
        if ".cls" not in self.members:
            return -1
        text = self.read(".cls").decode(errors="replace")
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{self.file}: sample {self.key} has the class {text!r}") from None


def _scan(path: Path) -> list[_Sample]:
    """List the samples of a tar file in order, from its headers alone.

    As webdataset has it, the key of a member ends at the first dot of its file name.
    """
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, file = member.name.rpartition("/")
                if not member.isfile() or file.startswith("."):
                    continue
                stem, dot, extension = file.partition(".")
                sample = samples.setdefault(
                    folder + slash + stem, _Sample(path, folder + slash + stem, {})
                )
                if dot + extension in sample.members:
                    raise ValueError(f"{path}: holds {member.name} more than once")
                sample.members[dot + extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: cannot be read as a tar file ({error})") from None
    return list(samples.values())


def _array(file: Path, offset: int) -> np.ndarray:
    """Memory-map the .npy data that starts at `offset` of a file."""
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            version = np.lib.format.read_magic(stream)
            old = version == (1, 0)
            header = (
                np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = header(stream)
            return np.memmap(file, dtype=dtype, mode="r", offset=stream.tell(), shape=shape)
    except ValueError as error:
        raise ValueError(
            f"{file}: no array at byte {offset} ({error}); write the shard again"
        ) from None


def _json_member(file: Path, offset: int) -> Any:
    """Read the JSON member whose data starts at `offset`; its size is in the tar header just
    before."""
    with file.open("rb") as stream:
        stream.seek(offset - tarfile.BLOCKSIZE)
        header = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "strict")
        return json.loads(stream.read(header.size))
