"""Writing index shards (docs/artifacts.md): deterministic bytes, resumable shard by shard.

A job is a request (the manifest without its shards) for a folder. `job.json` holds it while the
folder is being written, and `shard-000000.json` the entry of each finished shard; finishing joins
them to `manifest.json`.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ar.files import read_json, sha256_file, write_json
from ar.shards import BLOCK_SIZE, FORMAT

JOB_FORMAT = "omv2-index-shards-job"
ENTRY_FORMAT = "omv2-index-shards-entry"


def write_shard(
    folder: Path, number: int, indices: np.ndarray, labels: np.ndarray, keys: Sequence[str]
) -> dict[str, Any]:
    """Write one tar of blocks, atomically, and return its entry of the manifest.

    Args:
        indices: uint32 `[n, views, rows, columns]`.
        labels: int32 `[n]`.
        keys: n names, unique in the folder.
    """
    path = folder / f"shard-{number:06d}.tar"
    temporary = path.with_name(path.name + ".tmp")
    blocks = []
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first in range(0, len(keys), BLOCK_SIZE):
            part = slice(first, first + BLOCK_SIZE)
            name = f"{number:04d}{first // BLOCK_SIZE:04d}"
            members = {
                "indices": ("npy", _npy(indices[part].astype("<u4"))),
                "cls": ("npy", _npy(labels[part].astype("<i4"))),
                "key": ("json", json.dumps(list(keys[part])).encode()),
            }
            offsets = {}
            for member, (suffix, data) in members.items():
                info = tarfile.TarInfo(
                    f"{name}.{member}.{suffix}"
                )  # owner, mode and time are constants
                info.size = len(data)
                offsets[member] = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
            blocks.append({"name": name, "num_samples": len(keys[part]), "offsets": offsets})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    return {
        "file": path.name,
        "sha256": sha256_file(path),
        "size": path.stat().st_size,
        "num_samples": len(keys),
        "blocks": blocks,
    }


class ShardJob:
    """The writing of one folder of index shards, shared by all processes.

    Args:
        folder: where to write.
        request: the manifest without `format`, `version` and `shards`.
        num_shards: how many shards the request has.

    Raises:
        ValueError: when the folder belongs to another request, or holds something else.
    """

    def __init__(self, folder: Path, request: dict[str, Any], num_shards: int) -> None:
        self.folder = folder
        self.request = request
        self.num_shards = num_shards
        self.finished = False
        self._check()

    def _check(self) -> None:
        manifest, job = self.folder / "manifest.json", self.folder / "job.json"
        if manifest.is_file():
            found = read_json(manifest, FORMAT)
            self.finished = True
        elif job.is_file():
            found = read_json(job, JOB_FORMAT)
        elif self.folder.is_dir() and {f.name for f in self.folder.iterdir()} - {"job.json.tmp"}:
            raise ValueError(
                f"out={self.folder}: the folder holds other files; choose a new folder"
            )
        else:
            return
        found = {
            name: value
            for name, value in found.items()
            if name not in ("format", "version", "shards")
        }
        if found != self.request:
            changes = "; ".join(_differences(found, self.request))
            raise ValueError(
                f"out={self.folder}: holds another request ({changes}); choose a new folder"
            )

    def begin(self) -> None:
        """Create the folder and `job.json`; for one process, before any shard is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "job.json", {"format": JOB_FORMAT, "version": 1, **self.request})

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not complete yet."""
        return [number for number in range(self.num_shards) if self._entry(number) is None]

    def write(
        self, number: int, indices: np.ndarray, labels: np.ndarray, keys: Sequence[str]
    ) -> None:
        """Write shard `number` and its entry; see `write_shard`."""
        entry = write_shard(self.folder, number, indices, labels, keys)
        write_json(self._entry_path(number), {"format": ENTRY_FORMAT, "version": 1, "entry": entry})

    def finish(self) -> None:
        """Write the manifest and remove the files of the job; for one process, after all shards."""
        entries = [self._entry(number) for number in range(self.num_shards)]
        if None in entries:
            raise ValueError(
                f"out={self.folder}: shard {entries.index(None)} is missing after all processes "
                "wrote theirs; they need the same file system"
            )
        manifest = {"format": FORMAT, "version": 1, **self.request, "shards": entries}
        write_json(self.folder / "manifest.json", manifest)
        self.tidy()

    def tidy(self) -> None:
        """Remove the files of a finished job; for one process."""
        for number in range(self.num_shards):
            self._entry_path(number).unlink(missing_ok=True)
        (self.folder / "job.json").unlink(missing_ok=True)

    def _entry_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.json"

    def _entry(self, number: int) -> dict[str, Any] | None:
        path = self._entry_path(number)
        if not path.is_file():
            return None
        entry = read_json(path, ENTRY_FORMAT)["entry"]
        shard = self.folder / entry["file"]
        return entry if shard.is_file() and shard.stat().st_size == entry["size"] else None


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0))
    return buffer.getvalue()


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return `name: before -> now` for every value that differs between two nested requests."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(before.keys() | now.keys()):
            lines += _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return lines
    return [] if before == now else [f"{name}: {str(before)[:60]} there, {str(now)[:60]} asked"]
