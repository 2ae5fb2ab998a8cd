"""Pictures in folders: ROOT/SPLIT/CLASS/* (ImageNet's layout), ROOT/CLASS/* and ROOT/*."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.data.pictures import EXTENSIONS, UnreadablePicture, decode_picture
from tokenizer.data.source import PackedStrings, Skipped, choose_split

SPLIT_NAMES = ("train", "val", "test")

# Left out by the published ImageNet recipe, which trains on the other 1,281,166 pictures.
IMAGENET_EXCLUDED = "n06596364_9591.JPEG"


class Folder:
    """One split of a folder of pictures, sorted by name; a class id is the rank of a folder name.

    Class names are taken over all splits, so that an id means the same class in each of them.
    """

    def __init__(
        self, root: Path, split: str, *, val_fraction: float, exif_orientation: bool
    ) -> None:
        self.ignored = Skipped()
        self._exif_orientation = exif_orientation
        splits = split_folders(root)
        if splits and split not in (*splits, "all"):
            raise FileNotFoundError(
                f"data.split={split}: no such folder in {root}, which has {', '.join(splits)}"
            )
        # Keys are relative to this folder.
        self._base = root / split if split in splits else root
        folders = [root / name for name in splits] or [root]
        names = sorted({name for folder in folders for name in subfolders(folder)})
        self.class_names = names or None
        keys, labels = self._list([self._base] if split in splits else folders)
        chosen = np.arange(len(keys))
        if not splits:
            chosen = choose_split(keys, labels, split, val_fraction)
        self.keys = PackedStrings(keys[i] for i in chosen)
        self.labels = labels[chosen]

    def _list(self, folders: list[Path]) -> tuple[list[str], NDArray[np.int64]]:
        """Return keys and class ids of the pictures below `folders`; count what is no picture."""
        ids = {name: i for i, name in enumerate(self.class_names or [])}
        keys: list[str] = []
        labels: list[int] = []
        for folder in folders:
            prefix = "" if folder == self._base else f"{folder.name}/"
            for inner in files_below(folder):
                class_name, slash, _ = inner.partition("/")
                reason = _reason_to_ignore(inner)
                if reason:
                    self.ignored.add(ascii(prefix + inner)[1:-1], reason)
                elif ids and not slash:
                    self.ignored.add(prefix + inner, "beside the class folders")
                else:
                    keys.append(prefix + inner)
                    labels.append(ids[class_name] if ids else -1)
        return keys, np.array(labels, np.int64)

    def read(self, i: int) -> Image.Image:
        """Return picture i as RGB, or raise UnreadablePicture."""
        try:
            data = (self._base / self.keys[i]).read_bytes()
        except OSError as error:
            raise UnreadablePicture(f"cannot be read: {error.strerror}") from None
        return decode_picture(data, exif_orientation=self._exif_orientation)


def subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder` that are not hidden."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def split_folders(root: Path) -> list[str]:
    """Return which of train, val and test divide `root`; none if they are classes or absent.

    They are splits where train and val are both there, or where nothing else is: a set of
    vehicles may have a class called train.
    """
    names = subfolders(root)
    splits = [name for name in SPLIT_NAMES if name in names]
    return splits if {"train", "val"} <= set(splits) or len(splits) == len(names) else []


def files_below(folder: Path | str, prefix: str = "") -> Iterator[str]:
    """Yield the relative names of all files below `folder`, sorted; hidden folders are skipped."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir():
            yield prefix + entry.name
        elif not entry.name.startswith("."):
            yield from files_below(entry.path, f"{prefix}{entry.name}/")


def _reason_to_ignore(path: str) -> str | None:
    name = path.rpartition("/")[2]
    if name.startswith(".") or os.path.splitext(name)[1].lower() not in EXTENSIONS:
        return "not a picture by its name"
    if name == IMAGENET_EXCLUDED:
        return "left out as in the published recipe"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    return None
