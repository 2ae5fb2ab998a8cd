"""Improved precision and recall (Kynkaanniemi et al. 2019) of feature sets, in bounded memory."""

import torch

CHUNK = 2048  # rows and columns of a block of distances: 16 MB in float32


class FeatureSubset:
    """The features of `limit` pictures spread evenly over a set of `total`; mergeable."""

    def __init__(self, total: int, limit: int) -> None:
        self._total = total
        self._limit = min(limit, total)
        self._parts: dict[int, torch.Tensor] = {}  # number of the first picture -> [n, dim]

    def update(self, features: torch.Tensor, start: int) -> None:
        """Add features, float [n, dim], of the pictures start, start + 1, ..."""
        number = start + torch.arange(len(features))
        # Picture i is taken where i * limit / total crosses an integer: exactly `limit` times.
        quota = [(number + one) * self._limit // self._total for one in (0, 1)]
        taken = features[quota[1] > quota[0]]
        if len(taken):
            self._parts[start] = taken.clone()

    def merge(self, other: "FeatureSubset") -> None:
        """Add the pictures that `other` has seen."""
        self._parts |= other._parts

    def features(self) -> torch.Tensor:
        """Return the features in the order of the pictures, float [limit, dim]."""
        return torch.cat([self._parts[start] for start in sorted(self._parts)])


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, neighbours: int = 3
) -> tuple[float, float]:
    """Return (precision, recall) of float features [n, d] and [m, d] on one device.

    Precision is the share of generated points inside at least one ball around a real point that
    reaches to its k-th nearest real neighbour; recall swaps the roles. Distances are squared
    Euclidean ones of features centred on the real mean, which keeps float32 exact enough.
    """
    for name, points in (("real", real), ("generated", generated)):
        if len(points) <= neighbours:
            raise ValueError(f"{len(points)} {name} pictures have no neighbours={neighbours} each")
    centre = real.mean(0)
    real, generated = real - centre, generated - centre
    precision = _share_inside(generated, real, _radii(real, neighbours))
    recall = _share_inside(real, generated, _radii(generated, neighbours))
    return precision, recall


def _radii(points: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Squared distance of each point to its k-th nearest other point, [n]."""
    radii = []
    for rows in points.split(CHUNK):
        nearest = rows.new_empty(len(rows), 0)
        for columns in points.split(CHUNK):
            candidates = torch.cat([nearest, _squared_distances(rows, columns)], dim=1)
            # One more than k: the nearest of all is the point itself.
            keep = min(neighbours + 1, candidates.shape[1])
            nearest = candidates.topk(keep, dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _share_inside(queries: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    """Share of queries that lie in at least one ball (squared radii) around the centres."""
    inside = 0
    for rows in queries.split(CHUNK):
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, radius in zip(centres.split(CHUNK), radii.split(CHUNK), strict=True):
            found |= (_squared_distances(rows, columns) <= radius).any(1)
        inside += int(found.sum())
    return inside / len(queries)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    product = torch.addmm(columns.square().sum(1)[None, :], rows, columns.T, alpha=-2)
    return (product + rows.square().sum(1)[:, None]).clamp(min=0)
