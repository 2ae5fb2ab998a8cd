"""Measure how often generated pictures are recognised as the class they were asked to be.

    python -m eval.accuracy samples=outputs/samples train=outputs/train holdout=outputs/val

A support vector classifier learns from real pictures (`train`), is checked on others (`holdout`)
and judges the samples: its accuracy on them means as much as its accuracy on the holdout allows.
Meant for small pictures with few classes; the result does not depend on any downloaded weights.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from sklearn.svm import SVC
from tqdm import tqdm

from eval.config import AccuracyConfig, command
from eval.media import open_media
from eval.results import Record, print_table, write_results
from eval.shards import MediaShards, maker
from eval.source import Source

PENALTY = 10.0  # C of the classifier


@dataclass(frozen=True)
class Labelled:
    """Features and classes of a set of pictures."""

    features: np.ndarray  # float32 [n, 3 * side * side]
    classes: np.ndarray  # int64 [n]


def features(images_BCHW: torch.Tensor, side: int) -> np.ndarray:
    """Return uint8 pictures as float32 rows: resized to side x side, values in [-0.5, 0.5].

    Pixels are not standardised one by one: that would raise the noise of constant borders to the
    size of everything else.
    """
    small = F.interpolate(images_BCHW.float(), (side, side), mode="bilinear", antialias=True)
    return (small / 255 - 0.5).flatten(1).numpy()


def load(option: str, source: Source, config: AccuracyConfig, limit: int | None = None) -> Labelled:
    """Read a set, or `limit` pictures of it, evenly spaced.

    Raises:
        ValueError: a picture has no class.
    """
    total = len(source)
    kept = total if limit is None else min(limit, total)
    wanted = np.zeros(total, dtype=bool)
    wanted[np.arange(kept) * total // kept] = True
    rows, classes = [], []
    with tqdm(total=total, desc=option, unit=" images") as progress:
        for batch in source.batches(config.batch_size):
            keep = torch.from_numpy(wanted[batch.start : batch.start + len(batch.keys)])
            cls = batch.cls[keep]
            if bool((cls < 0).any()):
                names = [key for key, kept in zip(batch.keys, keep.tolist(), strict=True) if kept]
                key = names[int((cls < 0).nonzero()[0])]
                raise ValueError(
                    f"{option}={source.name}: {key} has no class; give pictures with classes "
                    "(a folder per class, or shards made from data with classes)"
                )
            if len(cls):
                rows.append(features(batch.images[keep], config.side))
                classes.append(cls.numpy())
            progress.update(len(batch.keys))
    return Labelled(np.concatenate(rows), np.concatenate(classes))


def match_classes(option: str, source: Source, train: Source) -> np.ndarray | None:
    """Return the class id in `train` of each class id of `source`, or None where ids are shared.

    Classes are matched by name where both sides have names, so two orders of the same names agree.

    Raises:
        ValueError: `source` has a class name that `train` has not.
    """
    if source.class_names is None or train.class_names is None:
        return None
    known = {name: i for i, name in enumerate(train.class_names)}
    foreign = [name for name in source.class_names if name not in known]
    if foreign:
        raise ValueError(
            f"{option}={source.name}: class {foreign[0]!r} is not among the classes of "
            f"train={train.name} ({preview(train.class_names)}); use sets with the same classes"
        )
    return np.array([known[name] for name in source.class_names], dtype=np.int64)


def preview(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def translate(
    option: str, data: Labelled, table: np.ndarray | None, trained: np.ndarray
) -> Labelled:
    """Return `data` with the class ids of the training set.

    Raises:
        ValueError: a class does not occur in the training set, `trained` being its class ids.
    """
    classes = data.classes
    if table is not None:
        if int(classes.max()) >= len(table):
            raise ValueError(
                f"{option}: class {int(classes.max())}, but class_names has {len(table)} names"
            )
        classes = table[classes]
    unknown = np.setdiff1d(classes, trained)
    if len(unknown):
        raise ValueError(
            f"{option}: class {int(unknown[0])} does not occur among the pictures of train; "
            "use sets with the same classes, or raise max_train"
        )
    return Labelled(data.features, classes)


def class_accuracies(
    predicted: np.ndarray, asked: np.ndarray, names: Sequence[str] | None
) -> dict[str, float]:
    """Return class name (or id) to the share of its pictures that are recognised."""
    return {
        names[cls] if names else str(cls): float((predicted[asked == cls] == cls).mean())
        for cls in np.unique(asked).tolist()
    }


def measure(config: AccuracyConfig) -> list[Record]:
    """Train the classifier, check it and judge the samples."""
    sources = {
        option: open_media(getattr(config, option), getattr(config, f"{option}_field"))
        for option in ("train", "holdout", "samples")
    }
    train_source = sources["train"]
    # Names are compared before anything is read.
    tables = {name: match_classes(name, sources[name], train_source) for name in sources}
    train = load("train", train_source, config, config.max_train)
    trained = np.unique(train.classes)
    if len(trained) < 2:
        raise ValueError(f"train={train_source.name}: holds one class; at least two are needed")
    classifier = SVC(C=PENALTY, kernel="rbf", gamma="scale").fit(train.features, train.classes)
    records = []
    for metric, option in (
        ("class_accuracy", "samples"),
        ("classifier_holdout_accuracy", "holdout"),
    ):
        source = sources[option]
        made_by = None
        if option == "samples" and isinstance(source, MediaShards):
            made_by = maker(source.manifest)
        data = translate(option, load(option, source, config), tables[option], trained)
        predicted = classifier.predict(data.features)
        protocol = {
            "name": "svc-rbf",
            "preprocessing": f"uint8 RGB, antialiased bilinear to {config.side}x{config.side}",
            "classifier": f"sklearn SVC, rbf, C={PENALTY:g}, gamma=scale",
            "train_count": len(train.classes),
            "holdout": sources["holdout"].name,
            "per_class": class_accuracies(predicted, data.classes, train_source.class_names),
        }
        records.append(
            Record(
                metric,
                float((predicted == data.classes).mean()),
                unit="fraction",
                count=len(data.classes),
                protocol=protocol,
                data=source.name,
                reference=train_source.name,
                checkpoint=made_by.checkpoint if made_by else None,
                seed=made_by.seed if made_by else None,
            )
        )
    return records


@command("accuracy", AccuracyConfig)
def main(config: AccuracyConfig) -> None:
    """Measure on the main process; the classifier needs no device and no other process."""
    if not PartialState(cpu=True).is_main_process:
        return
    start = time.perf_counter()
    records = measure(config)
    path = write_results(Path(config.out), "accuracy", records, time.perf_counter() - start)
    print_table(records)
    print(f"results: {path}")


if __name__ == "__main__":
    main()
