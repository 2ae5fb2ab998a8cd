"""A split of a data set, ready to be cut into views: all commands read pictures from it."""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.config import DataConfig
from tokenizer.data.digits import Digits
from tokenizer.data.folder import Folder, split_folders, subfolders
from tokenizer.data.source import Skipped, Source
from tokenizer.data.tars import Tars
from tokenizer.data.views import CENTER, View, cut

IMAGENET_VARIABLE = "IMAGENET_ROOT"


class Dataset:
    """Pictures with keys and class ids.

    `load` raises UnreadablePicture for a picture that cannot be used.
    """

    def __init__(self, source: Source, config: DataConfig, split: str, view: View) -> None:
        self.split = split
        self.view = view  # what `load` cuts unless told otherwise
        self.resolution = config.resolution
        self._source = source
        self._config = config

    def __len__(self) -> int:
        return len(self._source.keys)

    @property
    def class_names(self) -> list[str] | None:
        """Names by class id; None where there are no classes."""
        return self._source.class_names

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class id of each sample, [len(self)]; -1 where there are no classes."""
        return self._source.labels

    @property
    def ignored(self) -> Skipped:
        """What was found beside the pictures."""
        return self._source.ignored

    def key(self, i: int) -> str:
        """Return the unique name of sample i: a relative path with `/`."""
        return self._source.keys[i]

    def load(self, i: int, view: View | None = None, seed: int = 0) -> Tensor:
        """Return a view of sample i, uint8 [3, resolution, resolution].

        `seed` decides what is random in it.
        """
        return self.load_views(i, [view or self.view], [seed])[0]

    def load_views(self, i: int, views: list[View], seeds: list[int]) -> list[Tensor]:
        """Return several views of sample i, which is decoded once."""
        image = self._source.read(i)
        size, resize = self.resolution, self._config.resize or self.resolution
        return [
            cut(image, view, resolution=size, resize=resize, seed=seed)
            for view, seed in zip(views, seeds, strict=True)
        ]

    def describe(self) -> dict:
        """Return the `source` field of a manifest: what was read, and how it was prepared."""
        digest = hashlib.sha256()
        for i, label in enumerate(self.labels.tolist()):
            digest.update(f"{self.key(i)}\t{label}\n".encode())
        return {
            "name": self._config.name,
            "split": self.split,
            "num_samples": len(self),
            "digest": f"sha256:{digest.hexdigest()}",
            "resolution": self.resolution,
            "resize": self._config.resize or self.resolution,
            "exif_orientation": self._config.exif_orientation,
        }


def open_dataset(config: DataConfig, split: str, train: bool) -> Dataset:
    """Open `split` of a data set.

    Args:
        train: cut what `config.crop` and `config.flip` ask for; otherwise the centre.

    Raises:
        FileNotFoundError: where the data is not to be found, naming the option to set.
        ValueError: where there is no picture, or the split is unknown.
    """
    source = _open_source(config, split)
    if not len(source.keys):
        found = f" (found {source.ignored})" if source.ignored.reasons else ""
        raise ValueError(f"data.root={root_of(config)}: no picture in split {split}{found}")
    view = CENTER
    if train:
        view = View("train", config.crop == "random", 0.5 if config.flip else 0.0)
    return Dataset(source, config, split, view)


def root_of(config: DataConfig) -> str | None:
    """Return where the data lies: `data.root` or ImageNet's variable; None if neither is set."""
    variable = os.environ.get(IMAGENET_VARIABLE) if config.name == "imagenet" else None
    root = config.root or variable
    return os.path.expanduser(root) if root else None


def _open_source(config: DataConfig, split: str) -> Source:
    if config.name == "digits":
        return Digits(split)
    root = root_of(config)
    setting = "data.root=FOLDER"
    if config.name == "imagenet":
        setting += f" or the environment variable {IMAGENET_VARIABLE}"
    if root is None:
        raise FileNotFoundError(f"data={config.name} needs its folder: set {setting}")
    if not Path(root).is_dir() and not (config.name == "webdataset" and "{" in root):
        raise FileNotFoundError(f"data.root={root}: no such folder; set {setting}")
    if config.name == "webdataset":
        return Tars(
            root,
            split,
            val_fraction=config.val_fraction,
            label_key=config.label_key,
            exif_orientation=config.exif_orientation,
        )
    folder = Path(root)
    if config.name == "imagenet":
        _check_imagenet(folder)
    return Folder(
        folder, split, val_fraction=config.val_fraction, exif_orientation=config.exif_orientation
    )


def _check_imagenet(root: Path) -> None:
    splits = split_folders(root)
    if not splits:
        raise FileNotFoundError(f"data.root={root}: ImageNet has the folders train and val there")
    for split in splits:
        if not subfolders(root / split):
            raise ValueError(
                f"data.root={root}: {split} has no class folders; sort its pictures into folders "
                "called by their synset, such as n01440764"
            )
