"""The Frechet distance between two Gaussians, exact also with fewer samples than dimensions.

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)        (Dowson and Landau 1982)

With any root S1 = R R', the eigenvalues of S1 S2 that are not 0 are those of the symmetric matrix
R' S2 R: a Cholesky factor and a symmetric eigenvalue problem replace the square root of a
non-symmetric matrix that is slow and, for rank-deficient covariances, returns garbage in some
versions of SciPy.
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
    method: str  # "cholesky", or "pivoted cholesky" of a singular covariance
    rank: int  # of the covariance that was factored; below the dimension, N was too small


def frechet_distance(first: Moments, second: Moments) -> FrechetResult:
    """Return the Frechet distance of two sets of vectors; each needs at least 2.

    Raises ValueError where there is none.
    """
    if first.dim != second.dim:
        raise ValueError(f"features of {first.dim} and {second.dim} dimensions have no distance")
    for moments in (first, second):
        if not bool(moments.mean.isfinite().all() and moments.m2.isfinite().all()):
            raise ValueError("features that are not finite have no distance")
    if first.count > second.count:  # factor the covariance with the smaller rank
        first, second = second, first
    covariance_1, covariance_2 = first.covariance(), second.covariance()
    root, method = _root(covariance_1, first.count)
    spectrum = torch.linalg.eigvalsh(root.T @ covariance_2 @ root)
    cross = spectrum.clamp(min=0).sqrt().sum()
    mean_term = float((first.mean - second.mean).square().sum())
    trace_term = float(covariance_1.trace() + covariance_2.trace() - 2 * cross)
    value = max(mean_term + trace_term, 0.0)
    return FrechetResult(value, mean_term, trace_term, method, root.shape[1])


def _root(covariance: torch.Tensor, count: int) -> tuple[torch.Tensor, str]:
    """Return R [dim, rank] with R R' = covariance, which `count` samples gave, and the method."""
    if count > len(covariance):
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info) == 0:
            return factor, "cholesky"
    return _pivoted_cholesky(covariance, count - 1), "pivoted cholesky"


def _pivoted_cholesky(matrix: torch.Tensor, max_rank: int) -> torch.Tensor:
    """Return R [dim, rank] with R R' = matrix, positive semi-definite, of at most `max_rank`.

    Takes the largest remaining variance each time and stops at the rank. Columns for directions
    that the samples do not span would be rounding errors, which the square root of the spectrum
    lifts from 1e-16 to 1e-8 each.
    """
    dim = len(matrix)
    root = matrix.new_zeros(dim, min(max_rank, dim))
    remaining = matrix.diagonal().clone()  # diagonal of what is still to be explained
    tolerance = dim * torch.finfo(matrix.dtype).eps * float(remaining.max())
    for rank in range(root.shape[1]):
        pivot = int(remaining.argmax())
        if float(remaining[pivot]) <= tolerance:
            return root[:, :rank]
        column = matrix[:, pivot] - root[:, :rank] @ root[pivot, :rank]
        root[:, rank] = column / remaining[pivot].sqrt()
        remaining -= root[:, rank].square()
    return root
