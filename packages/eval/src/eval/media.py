"""Pictures in: one specification string to a source of uint8 batches.

FOLDER of images (recursive; the class is the first sub-folder)
FOLDER of media shards (docs/artifacts.md), with a field: images | original | reconstruction
FOLDER or FILE.tar of a webdataset of images
FILE.npz in ADM's layout: arr_0 uint8 [n, h, w, 3], optionally arr_1 [n] class ids
"""

import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch

from eval.pictures import EXTENSIONS, channels_first, decode_batches
from eval.shards import IndexShards, MediaShards, WebDataset, read_manifest
from eval.source import Batch, Source


def open_media(spec: str, field: str | None = None) -> Source:
    """Open the pictures that `spec` names.

    field: which pictures of media shards: "images" (generated), "original" or "reconstruction"
    (pairs). None means "original" for pairs and "images" otherwise. Other sources have only
    "images". Raises FileNotFoundError or ValueError, in one line, if there is nothing to read.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{spec}: no such file or folder")
    if path.is_dir() and ((path / "manifest.json").exists() or (path / "job.json").exists()):
        return MediaShards(path, read_manifest(path), field)
    if field not in (None, "images"):
        raise ValueError(f"{spec}: has no field {field!r}; only pair media shards have one")
    if path.is_file():
        if path.suffix == ".npz":
            return NpzSource(path)
        if path.suffix == ".tar":
            return WebDataset(spec, [path])
        raise ValueError(f"{spec}: not a folder, an .npz file or a .tar file")
    tars = sorted(path.rglob("*.tar"))
    return WebDataset(spec, tars) if tars else FolderSource(path)


def open_index_shards(folder: str) -> IndexShards:
    """Open a folder of index shards: iterating gives uint32 blocks [n, views, (t,) h, w]."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of index shards")
    return IndexShards(path, read_manifest(path))


class FolderSource(Source):
    """All images below a folder in the order of their paths; the class is the first sub-folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._keys = sorted(_pictures_below(root))
        if not self._keys:
            raise ValueError(f"{root}: no images ({', '.join(sorted(EXTENSIONS))}) in this folder")
        names = sorted({key.split("/")[0] for key in self._keys if "/" in key})
        super().__init__(str(root), names or None)
        index = {name: i for i, name in enumerate(names)}
        self._labels = [
            index.get(key.split("/")[0], -1) if "/" in key else -1 for key in self._keys
        ]

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, start: int, stop: int) -> Iterator[Batch]:
        keys = self._keys[start:stop]
        return decode_batches(
            start,
            keys,
            lambda i: (self._root / keys[i]).read_bytes(),
            self._labels[start:stop],
            self.converted,
        )


def _pictures_below(root: Path) -> Iterator[str]:
    """Yield the relative paths, with /, of the pictures below a folder by their names.

    Links to folders are followed: class folders may be such. Hidden files and folders are left out.
    """
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() in EXTENSIONS:
                yield path.relative_to(root).as_posix()


class NpzSource(Source):
    """ADM's sample file; `arr_0` is read as a stream from the zip member and never held whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), None)
        try:
            self._archive = zipfile.ZipFile(path)
            self._stream = self._archive.open("arr_0.npy")
            shape, fortran, dtype = _npy_header(self._stream)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not an .npz file with an array arr_0 ({error})") from None
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
            raise ValueError(
                f"{path}: arr_0 is {dtype} {list(shape)}; it must be uint8 [n, h, w, 3]"
            )
        if shape[0] == 0:
            raise ValueError(f"{path}: arr_0 holds no images")
        self._shape = shape
        self._data_offset = self._stream.tell()
        self._lock = threading.Lock()
        self._labels = np.full(shape[0], -1, dtype=np.int64)
        if "arr_1.npy" in self._archive.namelist():
            with np.load(path, allow_pickle=False) as arrays:
                self._labels = arrays["arr_1"].astype(np.int64)
            if self._labels.shape != (shape[0],):
                raise ValueError(
                    f"{path}: arr_1 is {list(self._labels.shape)}; arr_0 holds {shape[0]} images"
                )

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, start: int, stop: int) -> Iterator[Batch]:
        _, h, w, c = self._shape
        try:
            with self._lock:  # readers in several threads share one position
                self._stream.seek(self._data_offset + start * h * w * c)
                data = self._stream.read((stop - start) * h * w * c)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(
                f"{self.name}: arr_0 is damaged ({error}); copy the file again"
            ) from None
        if len(data) != (stop - start) * h * w * c:
            raise ValueError(f"{self.name}: arr_0 is cut short; copy the file again")
        yield Batch(
            images=channels_first(np.frombuffer(data, dtype=np.uint8).reshape(-1, h, w, c)),
            cls=torch.from_numpy(self._labels[start:stop].copy()),
            keys=[f"{i:08d}" for i in range(start, stop)],
            indices=None,
            start=start,
        )


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    reader = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return reader(stream)
