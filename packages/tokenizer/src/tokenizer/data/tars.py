"""Pictures in local webdataset tars: headers are read once, pictures then at random."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from tokenizer.data.pictures import UnreadablePicture, decode_picture
from tokenizer.data.source import PackedStrings, Skipped, choose_split

PICTURE_FIELDS = ("jpg", "jpeg", "png", "webp")
SPLIT_NAMES = ("train", "val", "test")


@dataclass(slots=True)
class _Sample:
    key: str
    tar: int  # position in the list of tars
    offset: int  # of the picture, and its size
    size: int
    label: int | str | None


class Tars:
    """One split of the samples in a set of tars: pictures, with a cls or json label or none."""

    def __init__(
        self, root: str, split: str, *, val_fraction: float, label_key: str, exif_orientation: bool
    ) -> None:
        self.ignored = Skipped()
        self._exif_orientation = exif_orientation
        self._paths, divided = choose_tars(root, split)
        samples = [sample for i in range(len(self._paths)) for sample in self._index(i, label_key)]
        self.class_names, labels = self._number_classes(samples)
        kept = np.flatnonzero(labels >= 0) if self.class_names else np.arange(len(samples))
        keys = self._unique_keys(samples)
        if not divided:
            kept_keys = [keys[i] for i in kept]
            kept = kept[choose_split(kept_keys, labels[kept], split, val_fraction)]
        self.keys = PackedStrings(keys[i] for i in kept)
        self.labels = labels[kept]
        places = [(samples[i].tar, samples[i].offset, samples[i].size) for i in kept]
        self._places = np.array(places, np.int64).reshape(-1, 3)  # tar, offset, size

    def read(self, i: int) -> Image.Image:
        """Return picture i as RGB, or raise UnreadablePicture."""
        tar, offset, size = self._places[i].tolist()
        try:
            with open(self._paths[tar], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise UnreadablePicture(f"cannot be read: {error.strerror}") from None
        return decode_picture(data, exif_orientation=self._exif_orientation)

    def _index(self, tar: int, label_key: str) -> Iterator[_Sample]:
        """Yield the samples of a tar that have a picture; count the others."""
        path = self._paths[tar]
        with open(path, "rb") as file:
            for key, members in grouped_members(path):
                picture = next((members[name] for name in PICTURE_FIELDS if name in members), None)
                if picture is None:
                    self.ignored.add(f"{path.name}/{key}", "no picture in the sample")
                    continue
                try:
                    label = _read_label(file, members, label_key)
                except ValueError:
                    raise ValueError(f"{path}: the label of sample {key} is damaged") from None
                yield _Sample(key, tar, *picture, label)

    def _number_classes(self, samples: list[_Sample]) -> tuple[list[str] | None, np.ndarray]:
        """Return class names and the class id of each sample: integers stay, names are ranked."""
        ids_found = {sample.label for sample in samples if isinstance(sample.label, int)}
        names_found = {sample.label for sample in samples if isinstance(sample.label, str)}
        if not ids_found and not names_found:
            return None, np.full(len(samples), -1, np.int64)
        if (ids_found and names_found) or min(ids_found, default=0) < 0:
            raise ValueError(
                f"{self._paths[0].parent}: labels must be all class ids from 0, or all names"
            )
        names = sorted(names_found) or [str(i) for i in range(max(ids_found) + 1)]
        ids = {name: i for i, name in enumerate(names)}
        labels = [-1 if sample.label is None else ids[str(sample.label)] for sample in samples]
        for sample, label in zip(samples, labels, strict=True):
            if label < 0:
                self.ignored.add(f"{self._paths[sample.tar].name}/{sample.key}", "no class label")
        return names, np.array(labels, np.int64)

    def _unique_keys(self, samples: list[_Sample]) -> list[str]:
        """Return the samples' keys, after the name of their tar where keys repeat."""
        keys = [sample.key for sample in samples]
        if len(set(keys)) < len(keys):
            keys = [f"{self._paths[sample.tar].stem}/{sample.key}" for sample in samples]
        if len(set(keys)) < len(keys):
            repeated = Counter(keys).most_common(1)[0][0]
            raise ValueError(f"{self._paths[0].parent}: the sample {repeated} is there twice")
        return keys


def choose_tars(root: str, split: str) -> tuple[list[Path], bool]:
    """Return the tars of `split`, and whether they hold this split alone.

    `root` is a folder or a brace pattern such as `shards/{000..146}.tar`. Splits are subfolders
    called train, val and test, or tars with one of these words in their names.
    """
    import braceexpand

    if "{" in root:
        paths = [Path(name) for name in braceexpand.braceexpand(root)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"data.root={root}: {missing[0]} is missing")
    else:
        folders = [Path(root, name) for name in SPLIT_NAMES if Path(root, name).is_dir()]
        paths = sorted(path for folder in folders or [Path(root)] for path in folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"data.root={root}: there is no .tar in it")
    split_of = [_split_in_name(path) for path in paths]
    if split == "all" or not any(split_of):
        return paths, split == "all"
    chosen = [path for path, name in zip(paths, split_of, strict=True) if name == split]
    if not chosen:
        there = ", ".join(sorted({name for name in split_of if name}))
        raise FileNotFoundError(
            f"data.split={split}: no tars of this split in {root}, only {there}"
        )
    return chosen, True


def _split_in_name(path: Path) -> str | None:
    words = [path.parent.name, *re.split("[^a-z]+", path.stem.lower())]
    return next((name for name in SPLIT_NAMES if name in words), None)


def grouped_members(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield (key, {field: (offset, size)}) for the samples of a webdataset tar.

    As webdataset has it, a sample is a run of files whose paths agree up to the first dot of the
    file name.
    """
    members: dict[str, tuple[int, int]] = {}
    current = None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + (member.size + 511) // 512 * 512
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not (member.isfile() and stem and dot):
                    continue
                key = folder + slash + stem
                if key != current and members:
                    yield str(current), members
                    members = {}
                current = key
                members[extension.lower()] = (member.offset_data, member.size)
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"no end mark at byte {end}")
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is not a complete, uncompressed tar: {error}") from None
    if members:
        yield str(current), members


def _read_label(
    file: BinaryIO, members: dict[str, tuple[int, int]], label_key: str
) -> int | str | None:
    """Return the class id or name from `cls` or, failing that, from `label_key` of `json`."""
    for name in ("cls", "json"):
        if name in members:
            offset, size = members[name]
            file.seek(offset)
            text = file.read(size).decode()
            if name == "cls":
                return int(text)
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("not an object")
            label = fields.get(label_key)
            if isinstance(label, int | str):
                return label
    return None
