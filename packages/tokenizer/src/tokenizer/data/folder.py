"""Pictures in folders: ImageNet's ROOT/SPLIT/SYNSET/*.JPEG, ROOT/SPLIT/CLASS/*, ROOT/CLASS/* and ROOT/*."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tokenizer.data.pictures import EXTENSIONS, UnreadablePicture, decode_picture
from tokenizer.data.source import PackedStrings, Skipped, choose_split

SPLIT_NAMES = ("train", "val", "test")

# Left out by the published ImageNet recipe, which trains on the other 1,281,166 pictures.
IMAGENET_EXCLUDED = "n06596364_9591.JPEG"


class Folder:
    """One split of a folder of pictures, sorted by name; class id = rank of the class folder's name.

    Class names are taken over all splits, so that an id means the same class in each of them.
    """

    def __init__(
        self, root: Path, split: str, *, val_fraction: float, exif_orientation: bool
    ) -> None:
        self.ignored = Skipped()
        self._root = root
        self._exif_orientation = exif_orientation
        splits = split_folders(root)
        if splits:
            self._choose_folders(splits, split)
        else:
            self._list([root], root)
            chosen = choose_split(self.keys, self.labels, split, val_fraction)
            self.keys = PackedStrings(self.keys[i] for i in chosen)
            self.labels = self.labels[chosen]

    def _choose_folders(self, splits: list[str], split: str) -> None:
        if split == "all":
            self._list([self._root / name for name in splits], self._root)
        elif split in splits:
            self._root = self._root / split
            names = {name for other in splits for name in subfolders(self._root.parent / other)}
            self._list([self._root], self._root, sorted(names))
        else:
            raise FileNotFoundError(
                f"data.split={split}: no such folder in {self._root}, which has {', '.join(splits)}"
            )

    def _list(self, folders: list[Path], base: Path, names: list[str] | None = None) -> None:
        """Find the pictures below `folders`; keys are relative to `base`."""
        if names is None:
            names = sorted({name for folder in folders for name in subfolders(folder)})
        ids = {name: i for i, name in enumerate(names)}
        keys: list[str] = []
        labels: list[int] = []
        for folder in folders:
            prefix = "" if folder == base else f"{folder.name}/"
            for inner in files_below(folder):
                class_name, slash, _ = inner.partition("/")
                reason = _reason_to_ignore(inner)
                if reason:
                    self.ignored.add(ascii(prefix + inner)[1:-1], reason)
                elif names and not slash:
                    self.ignored.add(prefix + inner, "beside the class folders")
                else:
                    keys.append(prefix + inner)
                    labels.append(ids[class_name] if names else -1)
        self.keys = PackedStrings(keys)
        self.labels = np.array(labels, np.int64)
        self.class_names = names or None

    def read(self, i: int) -> Image.Image:
        """Return picture i as RGB, or raise UnreadablePicture."""
        try:
            data = (self._root / self.keys[i]).read_bytes()
        except OSError as error:
            raise UnreadablePicture(f"cannot be read: {error.strerror}") from None
        return decode_picture(data, exif_orientation=self._exif_orientation)


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder` that are not hidden, sorted; none if it is missing."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def split_folders(root: Path) -> list[str]:
    """Return which of train, val and test divide `root`; none if they are classes or absent.

    They are splits where train and val are both there, or where nothing else is: a set of vehicles may have a class
    called train.
    """
    names = subfolders(root)
    splits = [name for name in SPLIT_NAMES if name in names]
    return splits if {"train", "val"} <= set(splits) or len(splits) == len(names) else []


def files_below(folder: Path | str, prefix: str = "") -> Iterator[str]:
    """Yield the relative names of the files in and below `folder`, sorted; hidden folders are left alone."""
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
