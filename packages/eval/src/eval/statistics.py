"""Mean and covariance of features: streaming, exactly mergeable, and the artifact that holds
them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

FORMAT = "omv2-statistics"
VERSION = 1
BLOCK = 1024  # rows that are collected before one matrix product


class Moments:
    """Count, mean and sum of centred outer products of vectors, in float64.

    Batches are combined with the update of Chan, Golub and LeVeque (1979): unlike raw sums it loses
    no digits when the mean is large, and merging the states of several processes is exact.
    """

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)  # [dim]
        self._m2 = torch.zeros(dim, dim, dtype=torch.float64)  # [dim, dim]
        self._pending: list[torch.Tensor] = []  # vectors that wait for a full block

    @classmethod
    def of(cls, count: int, mean: torch.Tensor, m2: torch.Tensor) -> "Moments":
        """Return the moments with these values (float64 [dim] and [dim, dim])."""
        moments = cls(len(mean))
        moments._count, moments._mean, moments._m2 = count, mean, m2
        return moments

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return len(self._mean)

    @property
    def count(self) -> int:
        """Number of vectors seen."""
        return self._count + sum(map(len, self._pending))

    @property
    def mean(self) -> torch.Tensor:
        """Mean, float64 [dim]."""
        self._flush()
        return self._mean

    @property
    def m2(self) -> torch.Tensor:
        """Sum of outer products of the centred vectors, float64 [dim, dim]."""
        self._flush()
        return self._m2

    def update(self, features: torch.Tensor) -> None:
        """Add vectors, float [n, dim]."""
        self._pending.append(features.double())
        if sum(map(len, self._pending)) >= BLOCK:
            self._flush()

    def merge(self, other: "Moments") -> None:
        """Add the vectors that `other` has seen."""
        self._flush()
        self._combine(other.count, other.mean, other.m2)

    def covariance(self) -> torch.Tensor:
        """Return the unbiased covariance, float64 [dim, dim]; at least two vectors are needed."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, there are {self.count}")
        return self.m2 / (self.count - 1)

    def _flush(self) -> None:
        if self._pending:
            features = torch.cat(self._pending)  # [n, dim]
            self._pending = []
            mean = features.mean(0)
            centred = features - mean
            self._combine(len(features), mean, centred.T @ centred)

    def _combine(self, count: int, mean: torch.Tensor, m2: torch.Tensor) -> None:
        if count == 0:
            return
        total = self._count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._m2 = self._m2 + m2
        self._m2.addr_(delta, delta, alpha=self._count * count / total)
        self._count = total


class PixelDigest:
    """Digest of a set of pictures: mergeable, independent of order and names.

    The sum modulo 2^256 of the SHA-256 of each picture's shape and pixels.
    """

    def __init__(self) -> None:
        self.total = 0

    def update(self, images: torch.Tensor) -> None:
        """Add pictures, uint8 [n, 3, h, w]."""
        head = f"{list(images.shape[2:])}".encode()
        for image in images.permute(0, 2, 3, 1).contiguous().numpy():
            digest = hashlib.sha256(head + image.tobytes()).digest()
            self.total = (self.total + int.from_bytes(digest, "big")) % 2**256

    def merge(self, other: "PixelDigest") -> None:
        """Add the pictures that `other` has seen."""
        self.total = (self.total + other.total) % 2**256

    def __str__(self) -> str:
        return f"sha256:{self.total:064x}"


@dataclass(frozen=True)
class Provenance:
    """What statistics were made of; all of it is kept in the file."""

    extractor: str
    weights: str  # sha256:...
    preprocessing: str
    source: str  # the pictures, in words
    content: str  # digest of the pictures


def save_statistics(path: Path, moments: Moments, provenance: Provenance) -> None:
    """Write moments as a statistics artifact (docs/artifacts.md)."""
    tensors = {
        "mean": moments.mean,
        "m2": moments.m2,
        "count": torch.tensor(moments.count, dtype=torch.int64),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), **vars(provenance)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(save(tensors, metadata=metadata))
    os.replace(temporary, path)


def load_statistics(path: Path, protocol: dict[str, Any]) -> tuple[Moments, Provenance]:
    """Read statistics that were made with `protocol` (extractor, weights, preprocessing).

    Raises FileNotFoundError, or ValueError naming what differs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such statistics file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        found = f"format {metadata.get('format')!r} version {metadata.get('version')!r}"
        raise ValueError(f"{path}: {found}; expected {FORMAT} version {VERSION}")
    for name in ("extractor", "preprocessing", "weights"):
        if metadata[name] != protocol[name]:
            raise ValueError(
                f"{path}: made with {name} {metadata[name]!r}, this run uses {protocol[name]!r}; "
                "give the pictures as ref and write new statistics with save_ref"
            )
    moments = Moments.of(int(tensors["count"]), tensors["mean"], tensors["m2"])
    fields = Provenance.__dataclass_fields__
    return moments, Provenance(**{name: metadata[name] for name in fields})
