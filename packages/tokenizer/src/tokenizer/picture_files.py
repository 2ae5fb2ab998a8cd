"""Pictures as other tools read them: a file each, or one .npz in the layout of ADM's evaluator."""

import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tokenizer.shards import Samples, encode_png

NPZ_FILE = "samples.npz"


class PictureFolder:
    """Writes KEY.png for each sample."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_samples = 0

    def add(self, samples: Samples) -> None:
        """Write the pictures of some samples."""
        for key, png in zip(samples.keys, encode_png(samples.arrays["images"]), strict=True):
            if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
                raise ValueError(f"the key {key!r} would lead out of {self._folder}")
            path = self._folder / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(png)
            temporary.replace(path)
        self._num_samples += len(samples.keys)

    def finish(self) -> dict[str, Any]:
        """Return the entry of the part."""
        return {"num_samples": self._num_samples}


class NpzPart:
    """Keeps the pixels of one part in a file until `join_npz` puts all parts together."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / f"part-{number:06d}.raw"
        self._file = open(f"{self._path}.tmp", "wb")
        self._cls: list[int] = []
        self._shape: tuple[int, ...] = ()

    def add(self, samples: Samples) -> None:
        """Append the pixels of some samples."""
        images = samples.arrays["images"]
        self._shape = images.shape[1:]
        self._file.write(images.tobytes())
        self._cls += samples.cls.tolist()

    def finish(self) -> dict[str, Any]:
        """Publish the file and return the entry of the part."""
        self._file.close()
        temporary = Path(self._file.name)
        size = temporary.stat().st_size
        temporary.replace(self._path)
        return {
            "file": self._path.name,
            "size": size,
            "num_samples": len(self._cls),
            "shape": list(self._shape),
            "cls": self._cls,
        }


def join_npz(folder: Path, parts: list[dict[str, Any]]) -> None:
    """Write samples.npz, `arr_0` uint8 [n, h, w, 3] and `arr_1` int64 [n]; remove parts."""
    cls = np.array([label for part in parts for label in part["cls"]], np.int64)
    temporary = folder / f"{NPZ_FILE}.tmp"
    with zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(_member("arr_0"), "w", force_zip64=True) as file:
            header = {
                "descr": "|u1",
                "fortran_order": False,
                "shape": (len(cls), *parts[0]["shape"]),
            }
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                with open(folder / part["file"], "rb") as pixels:
                    shutil.copyfileobj(pixels, file, 1 << 24)
        with archive.open(_member("arr_1"), "w") as file:
            np.lib.format.write_array(file, cls, allow_pickle=False)
    temporary.replace(folder / NPZ_FILE)
    for part in parts:
        (folder / part["file"]).unlink()


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy")  # with a fixed date: the same bytes every time
