"""Reading index shards (docs/artifacts.md): token grids by sample number, through memory maps.

Nothing is copied into memory at start-up: a block is looked at when its first sample is asked for,
and a batch is one fancy-indexed read per shard.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from ar.files import read_json, sha256_file

FORMAT = "omv2-index-shards"
BLOCK_SIZE = 256
_TAR_HEADER = 512  # bytes before the data of a tar member


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `manifest.json` and check the fields that this package uses.

    Raises:
        FileNotFoundError: when there is no manifest.
        ValueError: for another format or version, or a missing or wrong field, by name.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"no index shards in {folder}: {path} does not exist")
    manifest = read_json(path, FORMAT)
    kinds: dict[str, type | tuple[type, ...]] = {
        "tokenizer": dict,
        "codebook_bits": int,
        "grid": list,
        "views": list,
        "num_samples": int,
        "class_names": (list, type(None)),
        "shards": list,
    }
    for name, kind in kinds.items():
        if name not in manifest or not isinstance(manifest[name], kind):
            raise ValueError(f"{path}: field {name!r} is missing or of the wrong type")
    if len(manifest["grid"]) != 2:
        raise ValueError(f"{path}: grid={manifest['grid']}; only image grids [rows, columns] work")
    counted = sum(shard["num_samples"] for shard in manifest["shards"])
    if counted != manifest["num_samples"] or counted == 0 or not manifest["views"]:
        raise ValueError(
            f"{path}: num_samples={manifest['num_samples']}, but its shards hold {counted} samples "
            f"in {len(manifest['views'])} views"
        )
    return manifest


class IndexShards:
    """A folder of index shards, open for reading.

    Raises:
        FileNotFoundError: when the folder has no manifest or lacks a shard.
        ValueError: when the manifest is of another kind, or a shard is truncated.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.digest = sha256_file(self.folder / "manifest.json")
        self.tokenizer: dict[str, Any] = manifest["tokenizer"]
        self.codebook_bits: int = manifest["codebook_bits"]
        self.grid: tuple[int, ...] = tuple(manifest["grid"])
        self.num_views = len(manifest["views"])
        self.num_samples: int = manifest["num_samples"]
        self.class_names: list[str] | None = manifest["class_names"]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._words = [self._map(shard) for shard in self._shards]  # each uint32 [size / 4]
        blocks = [(s, b) for s, shard in enumerate(self._shards) for b in shard["blocks"]]
        self._blocks = [block for _, block in blocks]
        self._shard_of_block = np.array([s for s, _ in blocks])
        counts = np.array([block["num_samples"] for block in self._blocks])
        if counts.sum() != self.num_samples:
            raise ValueError(
                f"{self.folder}: blocks hold {counts.sum()} samples, not {self.num_samples}"
            )
        self._first = np.concatenate([[0], np.cumsum(counts)[:-1]])  # first sample of each block
        self._start = np.full(len(blocks), -1, np.int64)  # first word of each block, once seen
        self._labels = np.zeros(self.num_samples, np.int64)

    @property
    def num_classes(self) -> int:
        return len(self.class_names or [])

    @property
    def tokens_card(self) -> dict[str, Any]:
        """Return what a checkpoint says about the tokens it was trained on."""
        return {
            "tokenizer": self.tokenizer,
            "codebook_bits": self.codebook_bits,
            "grid": list(self.grid),
            "class_names": self.class_names,
        }

    def read(self, samples: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens, int64 `[n, rows x columns]`, and labels, int64 `[n]`, of n samples.

        Args:
            samples: int64 `[n]`, in [0, num_samples).
            views: int64 `[n]`, in [0, num_views).
        """
        length = self.grid[0] * self.grid[1]
        block = np.searchsorted(self._first, samples, side="right") - 1
        for unseen in np.unique(block[self._start[block] < 0]):
            self._open(unseen)
        within = (samples - self._first[block]) * self.num_views + views
        start = self._start[block] + within * length
        shard = self._shard_of_block[block]
        tokens = np.empty((len(samples), length), np.int64)
        for s in np.unique(shard):
            rows = np.flatnonzero(shard == s)
            tokens[rows] = self._words[s][start[rows, None] + np.arange(length)]
            if tokens[rows].max() >> self.codebook_bits:
                raise ValueError(
                    f"{self._path(self._shards[s])}: holds index {tokens[rows].max()}, "
                    f"beyond codebook_bits={self.codebook_bits}; encode it anew"
                )
        return tokens, self._labels[samples]

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare the sha256 of the shards with the manifest; each process takes its share.

        Raises:
            ValueError: naming the first shard that differs.
        """
        for shard in self._shards[rank::world_size]:
            if sha256_file(self._path(shard)) != shard["sha256"]:
                path = self._path(shard)
                raise ValueError(f"{path}: its sha256 differs from the manifest; encode it anew")

    def _path(self, shard: dict[str, Any]) -> Path:
        return self.folder / shard["file"]

    def _map(self, shard: dict[str, Any]) -> np.ndarray:
        path = self._path(shard)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: listed in the manifest but not there")
        if path.stat().st_size != shard["size"]:
            size = path.stat().st_size
            raise ValueError(f"{path}: truncated or changed, {size} of {shard['size']} bytes")
        return np.asarray(np.memmap(path, np.uint32, mode="r"))

    def _open(self, number: int) -> None:
        """Find the arrays of a block and check that they are what the manifest says."""
        block = self._blocks[number]
        shard = self._shard_of_block[number]
        n = block["num_samples"]
        shape = (n, self.num_views, *self.grid)
        start, _ = self._array(shard, block, "indices", np.dtype("<u4"), shape)
        label_start, label_stop = self._array(shard, block, "cls", np.dtype("<i4"), (n,))
        labels = self._words[shard][label_start:label_stop].view(np.int32)
        if labels.min() < -1 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{self._path(self._shards[shard])}: block {block['name']} has class ids from "
                f"{labels.min()} to {labels.max()}, but the manifest names {self.num_classes}"
            )
        first = self._first[number]
        self._labels[first : first + n] = labels
        self._start[number] = start

    def _array(
        self, shard: int, block: dict[str, Any], name: str, dtype: np.dtype, shape: tuple[int, ...]
    ) -> tuple[int, int]:
        """Return where a `.npy` member's data starts and stops, in words, after checking it."""
        bytes_ = self._words[shard].view(np.uint8)
        offset = block["offsets"][name]
        member = f"{block['name']}.{name}.npy"
        title = bytes_[max(0, offset - _TAR_HEADER) : offset][:100].tobytes().rstrip(b"\0")
        try:
            if title != member.encode() or offset % 4:
                raise ValueError(f"the manifest's offset {offset} is not its start")
            header = io.BytesIO(bytes_[offset : offset + 4096].tobytes())
            if npy.read_magic(header) != (1, 0):
                raise ValueError("unknown .npy version")
            found_shape, fortran, found_dtype = npy.read_array_header_1_0(header)
            if found_shape != shape or found_dtype != dtype or fortran:
                raise ValueError(f"it is {found_dtype} {found_shape}, expected {dtype} {shape}")
            start = offset + header.tell()
            stop = start + 4 * int(np.prod(shape))
            if stop > len(bytes_) or start % 4:
                raise ValueError("its data is cut off")
        except ValueError as error:
            path = self._path(self._shards[shard])
            raise ValueError(f"{path}: member {member}: {error}; encode it anew") from None
        return start // 4, stop // 4
