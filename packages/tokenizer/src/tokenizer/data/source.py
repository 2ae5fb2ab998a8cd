"""What every data set gives: named, labelled pictures in a fixed order, and what was left out."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_EXAMPLES = 20


class PackedStrings(Sequence[str]):
    """A list of strings in two arrays: millions of names stay shared between worker processes."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [string.encode() for string in strings]
        self._data = np.frombuffer(b"".join(parts), np.uint8)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        start = self._ends[i - 1] if i else 0
        return self._data[start : self._ends[i]].tobytes().decode()


@dataclass
class Skipped:
    """Counted reasons for inputs that were not used, with the first few names."""

    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Count one input."""
        self.reasons[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{name}: {reason}")

    def merge(self, other: dict) -> None:
        """Add the `to_json` form of another count."""
        self.reasons.update(other["reasons"])
        self.examples = (self.examples + other["examples"])[:MAX_EXAMPLES]

    def to_json(self) -> dict:
        """Return the `skipped` field of a manifest."""
        return {
            "count": self.reasons.total(),
            "reasons": dict(sorted(self.reasons.items())),
            "examples": self.examples,
        }

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())


class Source(Protocol):
    """The pictures of one split of a data set, in a fixed order."""

    keys: PackedStrings  # unique names with `/` between folders
    labels: NDArray[np.int64]  # [len(keys)] class ids; -1 where there are no classes
    class_names: list[str] | None
    ignored: Skipped  # what was found beside the pictures

    def read(self, i: int) -> Image.Image:
        """Return picture i as RGB, or raise UnreadablePicture."""
        ...


def held_out(keys: Sequence[str], labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Mark ceil(fraction * n) samples as validation: a stratified choice by names and labels alone.

    Within a class the samples are ranked by the hash of their name; the ones with the smallest
    relative rank are taken.
    """
    digests = np.array([hashlib.sha256(key.encode()).digest()[:8] for key in keys], dtype="S8")
    order = np.lexsort((digests, labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.empty(len(keys))
    rank[order] = np.concatenate(
        [(np.arange(count) + 0.5) / count for count in counts] or [np.empty(0)]
    )
    size = int(np.ceil(round(fraction * len(keys), 6)))
    marked = np.zeros(len(keys), bool)
    marked[np.lexsort((digests, rank))[:size]] = True
    return marked


def choose_split(
    keys: Sequence[str], labels: NDArray[np.int64], split: str, fraction: float
) -> NDArray[np.int64]:
    """Return the positions of `split` (train, val, all) where the data has no splits of its own."""
    if split == "all":
        return np.arange(len(keys))
    if split not in ("train", "val"):
        raise ValueError(f"data.split={split}: this data set has the splits train, val and all")
    marked = held_out(keys, labels, fraction)
    return np.flatnonzero(marked if split == "val" else ~marked)
