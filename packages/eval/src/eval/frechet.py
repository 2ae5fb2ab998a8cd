"""The Frechet distance between two Gaussians, exact also with fewer samples than dimensions.

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)        (Dowson and Landau 1982)

With any root S1 = R R', the eigenvalues of S1 S2 are those of the symmetric matrix R' S2 R: a
Cholesky factor and a symmetric eigenvalue problem replace the square root of a non-symmetric matrix
that is slow and, for rank-deficient covariances, returns garbage in some versions of SciPy.
"""

from dataclasses import dataclass

import torch

from eval.statistics import Moments


@dataclass(frozen=True)
class FrechetResult:
    """The distance, its parts, and how it was computed."""

    value: float
    mean_term: float  # |m1 - m2|^2
    trace_term: float  # the rest
    method: str  # "cholesky", or "eigh" where no covariance has full rank
    rank: int  # of the product of the covariances, at most; below the dimension, N was too small


def frechet_distance(first: Moments, second: Moments) -> FrechetResult:
    """Return the Frechet distance of two sets of vectors; each needs at least 2."""
    if first.dim != second.dim:
        raise ValueError(f"features of {first.dim} and {second.dim} dimensions have no distance")
    if first.count < second.count:  # factor the covariance of the larger set: it has more rank
        first, second = second, first
    covariance_1, covariance_2 = first.covariance(), second.covariance()
    rank_1 = min(first.count - 1, first.dim)
    rank = min(second.count - 1, rank_1)
    root, method = _root(covariance_1, rank_1)
    spectrum = torch.linalg.eigvalsh(root.T @ covariance_2 @ root)  # ascending
    # At most `rank` eigenvalues differ from 0. The others are rounding errors, and the square root
    # would lift them from 1e-16 to 1e-8 each.
    cross = spectrum[-rank:].clamp(min=0).sqrt().sum()
    mean_term = float((first.mean - second.mean).square().sum())
    trace_term = float(covariance_1.trace() + covariance_2.trace() - 2 * cross)
    return FrechetResult(max(mean_term + trace_term, 0.0), mean_term, trace_term, method, rank)


def _root(covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, str]:
    """Return R [d, <= d] with R R' = covariance, and the method."""
    if rank == len(covariance):
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info) == 0:
            return factor, "cholesky"
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt(), "eigh"
